"""Rows of similar lengths side by side, in a few shapes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from examples.finetune.planner.encode import Row

# Lengths are rounded up to multiples of it.
_MULTIPLE = 32


class Batch(NamedTuple):
    """Rows padded to one length, and empty rows where there are too few of them.

    Logits are needed where a learned token comes next only: a vocabulary of 50,000 makes those of a
    whole prompt larger than everything else.
    """

    tokens: np.ndarray  # (B, T) int32
    positions: np.ndarray  # (B, C) int32: of the token before each learned one.
    targets: np.ndarray  # (B, C) int32: the learned ones.
    weight: np.ndarray  # (B, C) float32: 1 for a learned token, 0 for padding.


class Shape(NamedTuple):
    """Shape that rows are padded to."""

    tokens: int  # T
    learned: int  # C


class Layout(NamedTuple):
    """The shapes that there are, the smaller ones first."""

    shapes: tuple[Shape, ...]

    def shape_for(self, length: int) -> Shape:
        """The smallest one that has room for rows of so many tokens."""
        return next(shape for shape in self.shapes if shape.tokens >= length)


def make_layout(rows: Sequence[Row], buckets: int) -> Layout:
    """Shapes for these rows: as many of them go into one as into another, before rounding."""
    lengths = np.array([_inputs(row) for row in rows])
    shares = np.arange(1, buckets + 1) / buckets
    widths = {_round_up(int(q)) for q in np.quantile(lengths, shares, method="higher")}
    return Layout(
        tuple(
            # Shorter rows may come along with longer ones.
            Shape(width, _round_up(max(row.learned for row in rows if _inputs(row) <= width)))
            for width in sorted(widths)
        )
    )


def steps_per_epoch(rows: Sequence[Row], rows_per_step: int) -> int:
    return -(-len(rows) // rows_per_step)


def train_steps(
    rows: Sequence[Row], layout: Layout, batch_size: int, accumulate: int, seed: int, start: int
) -> Iterator[list[Batch]]:
    """The batches of one step after another without end, from the step number `start` on.

    Rows are drawn for a whole step, and sorted by length within it only. A step is a function of
    its number and the seed alone, so that a resumed run sees the same.
    """
    batch_size = min(batch_size, len(rows))
    size = batch_size * accumulate
    epoch, position = divmod(start, steps_per_epoch(rows, size))
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        for chosen in _chunks([rows[i] for i in order], size)[position:]:
            yield [batch for _, batch in batches(chosen, layout, batch_size)]
        epoch, position = epoch + 1, 0


def batches(
    rows: Sequence[Row], layout: Layout, batch_size: int
) -> Iterator[tuple[list[int], Batch]]:
    """All rows once, the shorter ones first, as their numbers and a batch."""
    order = sorted(range(len(rows)), key=lambda i: _inputs(rows[i]))
    for numbers in _chunks(order, batch_size):
        chosen = [rows[i] for i in numbers]
        yield numbers, make_batch(chosen, layout.shape_for(max(map(_inputs, chosen))), batch_size)


def make_batch(rows: Sequence[Row], shape: Shape, batch_size: int) -> Batch:
    """These rows, in this shape."""
    tokens = np.zeros((batch_size, shape.tokens), np.int32)
    positions, targets = np.zeros((2, batch_size, shape.learned), np.int32)
    weight = np.zeros((batch_size, shape.learned), np.float32)
    for k, row in enumerate(rows):
        n, c = _inputs(row), row.learned
        tokens[k, :n] = row.tokens[:-1]
        positions[k, :c] = np.arange(row.prompt - 1, n)
        targets[k, :c] = row.tokens[row.prompt :]
        weight[k, :c] = 1
    return Batch(tokens, positions, targets, weight)


def learned_tokens(batches: Sequence[Batch]) -> int:
    """Number of learned tokens."""
    return sum(int(batch.weight.sum()) for batch in batches)


def _inputs(row: Row) -> int:
    """The last token is not looked at: nothing comes after it."""
    return len(row.tokens) - 1


def _round_up(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
