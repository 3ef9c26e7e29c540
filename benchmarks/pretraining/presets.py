"""Sizes at which optimizers are compared."""

import dataclasses
from typing import NamedTuple

from examples.llama.model.config import MODEL_PRESETS, ModelConfig


class Preset(NamedTuple):
    """Settings of all methods at one size."""

    model: ModelConfig
    steps: int
    rows: int  # of a step, over all its micro-batches
    seq_len: int
    rank: int
    update_interval: int  # of every method that refreshes a subspace at intervals
    validation_tokens: int  # that each point of the validation curve is the mean of
    evaluations: int = 20
    tuning_steps: int | None = None  # of the runs of a search; None: ``steps``


# 200 steps between refreshes are for runs of 10,000: here there would be one or two.
_NANO = Preset(
    MODEL_PRESETS["nano"],
    steps=400,
    rows=16,
    seq_len=128,
    rank=32,
    update_interval=100,
    validation_tokens=8 * 2048,
)
_9M = _NANO._replace(
    model=MODEL_PRESETS["9m"], steps=600, tuning_steps=300, rows=8, seq_len=256, rank=64
)


def _nano_at(width: int) -> Preset:
    """Nano's depth, vocabulary and batch at another width, for a quarter of its steps.

    The size of a head and the shares of feed-forward width and rank in the width stay.
    """
    nano = _NANO.model
    wider = width // nano.hidden
    model = dataclasses.replace(
        nano,
        hidden=width,
        intermediate=wider * nano.intermediate,
        heads=wider * nano.heads,
        kv_heads=wider * nano.kv_heads,
    )
    return _NANO._replace(model=model, steps=100, rank=wider * _NANO.rank)


PRESETS = {
    # About a second: for tests, and to try a new row of the table of methods.
    "tiny": Preset(
        ModelConfig(
            vocab_size=300,
            hidden=16,
            intermediate=24,
            layers=1,
            heads=2,
            kv_heads=2,
            max_length=16,
        ),
        steps=10,
        rows=2,
        seq_len=16,
        rank=4,
        update_interval=5,
        validation_tokens=256,
    ),
    "nano": _NANO,
    "9m": _9M,
    # Between 9m and 60m: twice 9m's width, its vocabulary and batch.
    "30m": _9M._replace(
        model=dataclasses.replace(
            _9M.model, hidden=512, intermediate=1376, layers=7, heads=8, kv_heads=8
        ),
        steps=300,
        tuning_steps=None,
        rank=128,
    ),
    # To see how the best rates change with the width alone.
    **{f"width-{width}": _nano_at(width) for width in (128, 256, 512)},
    # The protocol of the GaLore papers, for an accelerator; the papers go on to 10,000 steps.
    "60m": Preset(
        MODEL_PRESETS["60m"],
        steps=1000,
        rows=512,
        seq_len=256,
        rank=128,
        update_interval=200,
        validation_tokens=4 * 131_072,
    ),
}
