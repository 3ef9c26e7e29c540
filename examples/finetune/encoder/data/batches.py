"""Batches of rows of similar lengths: little of them is padding."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from examples.finetune.encoder.data.encode import Encoded
from examples.finetune.encoder.model import Inputs

# Rows are sorted by length within so many batches, which leaves enough chance in who is with whom.
_POOL = 20


class Batch(NamedTuple):
    """Rows padded to one length, and empty rows where there are too few of them."""

    inputs: Inputs
    labels: np.ndarray  # (B,)
    weight: np.ndarray  # (B,) float32: 1 for a row, 0 for an empty one.


class Layout(NamedTuple):
    """Layout of rows in a batch."""

    batch_size: int
    max_length: int  # No row is longer.
    pad_token: int
    multiple: int = 16  # Batches are padded to a multiple of it: each length is compiled anew.


def steps_per_epoch(encoded: Encoded, batch_size: int) -> int:
    return -(-len(encoded.tokens) // batch_size)


def train_batches(encoded: Encoded, layout: Layout, seed: int, start: int) -> Iterator[Batch]:
    """Batches of one epoch after another without end, from the batch number `start` on.

    A batch is a function of its number and the seed alone, so that a resumed run sees the same.
    """
    epoch, position = divmod(start, steps_per_epoch(encoded, layout.batch_size))
    while True:
        for rows in _epoch(encoded.lengths, layout.batch_size, seed, epoch)[position:]:
            yield make_batch(encoded, rows, layout)
        epoch, position = epoch + 1, 0


def eval_batches(encoded: Encoded, layout: Layout) -> Iterator[tuple[np.ndarray, Batch]]:
    """All rows once, as their numbers and a batch."""
    order = np.argsort(encoded.lengths, kind="stable")
    for rows in _chunks(order, layout.batch_size):
        yield rows, make_batch(encoded, rows, layout)


def make_batch(encoded: Encoded, rows: np.ndarray, layout: Layout) -> Batch:
    """The rows of these numbers."""
    longest = max(len(encoded.tokens[i]) for i in rows)
    length = min(-(-longest // layout.multiple) * layout.multiple, layout.max_length)
    shape = (layout.batch_size, length)
    tokens = np.full(shape, layout.pad_token, np.int32)
    types, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    labels = np.zeros(layout.batch_size, encoded.labels.dtype)
    weight = np.zeros(layout.batch_size, np.float32)
    for k, i in enumerate(rows):
        n = len(encoded.tokens[i])
        tokens[k, :n], types[k, :n], mask[k, :n] = encoded.tokens[i], encoded.types[i], True
        labels[k], weight[k] = encoded.labels[i], 1
    return Batch(Inputs(tokens, types, mask), labels, weight)


def _epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Numbers of the rows of each batch, each row once."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for pool in _chunks(order, _POOL * batch_size):
        by_length = pool[np.argsort(lengths[pool], kind="stable")]
        batches += _chunks(by_length, batch_size)
    # A short batch goes where it falls. Its mean makes a step like any other's.
    return [batches[i] for i in random.permutation(len(batches))]


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
