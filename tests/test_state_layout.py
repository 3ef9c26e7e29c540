"""The table of docs/sharding.md is that of its benchmark, and its counts hold by hand."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks.distributed import state_layout
from benchmarks.distributed.state_layout import Scheme

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "sharding.md"


def test_the_page_has_the_table_of_the_benchmark():
    assert state_layout.layout_table("7b") in PAGE.read_text()


KILO = 2 * 1024  # bytes of as many numbers


@pytest.mark.parametrize(
    ("scheme", "part", "optimizer", "training"),
    [
        (Scheme("nothing"), 1, 0, 2 * 7 / 8 * 64),
        (Scheme("low-rank gradients", low_rank_gradients=True), 1, 0, 2 * 7 / 8 * 32),
        # R and its update over 8.
        (Scheme("shorter", shorter=8), 8, 2 * 7 / 8 * 32, 3 * 7 / 8 * 64),
        # P over 8.
        (Scheme("longer", longer=8), 8, 7 / 8 * 16, 3 * 7 / 8 * 64),
        # Half of P over 4; a quarter of R and of its update over 2.
        (Scheme("both", shorter=2, longer=4), 8, 3 / 4 * 8 + 2 * 1 / 2 * 8, 3 * 7 / 8 * 64),
        (Scheme("layers", layers=8), 8, 0, None),
    ],
    ids=lambda x: x.name if isinstance(x, Scheme) else "",
)
def test_a_stack_by_hand(monkeypatch, scheme, part, optimizer, training):
    """8 matrices of 128 × 64 at rank 32: 64 K numbers, P has 16 K, R 32 K, as do M and V each."""
    monkeypatch.setitem(state_layout.LLAMA_RANKS, "stack", 32)
    params = {"w": jax.ShapeDtypeStruct((8, 128, 64), jnp.bfloat16)}
    found = state_layout.per_device(params, scheme, "stack")
    assert found.weights * part == 64 * KILO
    assert found.bases * part == 16 * KILO
    # Fisher entries, 8 × (32 + 128) in float32, and counters are beside the moments.
    assert 0 < found.rest - 64 * KILO / part < 4 * 8 * 160 + 200
    assert found.optimizer_sends == optimizer * KILO
    assert found.training_sends == (None if training is None else training * KILO)
