"""Counts of benchmarks/distributed/sharding.py, against counts by hand."""

import pytest

from benchmarks.distributed import sharding
from benchmarks.distributed.collectives import sent_bytes

PROGRAM = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %a = f32[8,2]{1,0} all-gather(%p), dimensions={0}
  %b = f32[4]{0} all-reduce(%p), to_apply=%add
  %c = f32[1]{0} reduce-scatter(%p), to_apply=%add
  %d = (f32[1], f32[1]) all-to-all(%p, %p)
  %e = bf16[3]{0} collective-permute(%p)
}
"""


def test_bytes_that_a_ring_of_four_sends():
    gather, reduce, scatter, exchange, permute = 64 * 3 / 4, 16 * 2 * 3 / 4, 4 * 3, 8 * 3 / 4, 6
    assert sent_bytes(PROGRAM, 4) == gather + reduce + scatter + exchange + permute


def test_a_small_model_is_near_its_floors():
    row = sharding.row("nano", 32, "shorter side", "galore_adamw")
    assert row["sent"] == pytest.approx(row["sent_floor"], rel=sharding.LIMIT - 1)
    # Elementwise operations are a larger share of so small a model: see the floor of 350m.
    assert row["flops_floor"] < row["flops"] < 1.5 * row["flops_floor"]
    assert row["sent_in_a_round"] > 0
