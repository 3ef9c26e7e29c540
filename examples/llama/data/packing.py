"""Rows of tokens: training batches without end, evaluation batches that cover every token once.

A row holds `seq_len + 1` tokens, inputs `row[:-1]` and targets `row[1:]`.

Packed rows are full: consecutive ones share one token, so every token but the first of the split
is a target exactly once. Documents follow one another; attention crosses their end-of-text tokens.

Rows of documents hold one each, as in the GaLore papers: `seq_len` tokens at most, the last of
which ends the document, then `PAD`, which is no target.
"""

from collections.abc import Iterator

import grain
import numpy as np

from examples.common.errors import DataError

PAD = -1
"""No token: neither read nor predicted."""


class Rows:
    """The full rows of a token array, as a random-access source for Grain."""

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._seq_len
        return self._tokens[start : start + self._seq_len + 1]


class DocumentRows:
    """The documents of a token array, each in a row, as a random-access source for Grain."""

    def __init__(self, tokens: np.ndarray, seq_len: int, end_of_text: int):
        if seq_len < 2:  # The first token is none to predict.
            raise DataError(f"rows of documents need a --seq-len of at least 2, got {seq_len}")
        ends = np.flatnonzero(tokens == end_of_text) + 1
        self._tokens, self._seq_len = tokens, seq_len
        self._bounds = np.append(0, ends)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        start, end = self._bounds[index : index + 2]
        return document_row(self._tokens[start:end], self._seq_len)


def document_row(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """A document and its end-of-text token, cut to `seq_len` tokens, in a row of `seq_len + 1`."""
    row = np.full(seq_len + 1, PAD, np.int32)
    length = min(len(tokens), seq_len)
    row[: length - 1], row[length - 1] = tokens[: length - 1], tokens[-1]
    return row


def make_train_iterator(
    tokens: np.ndarray,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    documents_end: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Yields {"tokens": int32 (batch_size // process_count, seq_len + 1)} without end.

    Each epoch visits every full row once, in an order of its own drawn from `seed`; the last
    tokens that fill no row are left out. Batches run across the ends of epochs. `batch_size` is
    global: process p yields the p-th block of the batch that one process alone would yield.
    With `documents_end`, the end-of-text token, rows are documents, and may hold `PAD`.
    `get_state` and `set_state` continue with identical batches.
    """
    rows = (
        Rows(tokens, seq_len)
        if documents_end is None
        else DocumentRows(tokens, seq_len, documents_end)
    )
    if len(rows) == 0:
        raise DataError(
            f"the training text holds {len(tokens)} tokens, fewer than one row of {seq_len + 1}: "
            "give more text or shorter rows"
        )
    mine = process_slice(batch_size, process_index, process_count)
    return iter(
        grain.MapDataset.range(len(rows))
        .seed(seed)
        .shuffle()
        .repeat()
        # Some microseconds a row, behind an asynchronous step: threads would only take cores.
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        # Numbers of rows, of which each process reads its own: a position is one of global
        # batches, whatever the number of processes.
        .batch(batch_size)
        .map(lambda numbers: {"tokens": np.stack([rows[i] for i in numbers[mine]], dtype=np.int32)})
    )


def eval_rows(tokens: np.ndarray, seq_len: int, documents_end: int | None = None) -> int:
    """Rows of :func:`eval_batches` that have a target."""
    if documents_end is not None:
        return len(DocumentRows(tokens, seq_len, documents_end))
    return -(-(len(tokens) - 1) // seq_len)


def eval_batches(
    tokens: np.ndarray,
    batch_size: int,
    seq_len: int,
    *,
    documents_end: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields {"tokens": int32 (B, seq_len + 1), "mask": float32 (B, seq_len)}, B as in training.

    The mask is 1 where a target is real. Over all batches (and processes) it marks every token
    but the first exactly once; what fills the last row and the last batch is masked. With
    `documents_end` rows are documents, whose ends beyond `seq_len` are not evaluated.
    """
    if len(tokens) < 2:
        raise DataError(f"the held-out text holds {len(tokens)} tokens: too short to evaluate")
    mine = process_slice(batch_size, process_index, process_count)
    if documents_end is not None:
        documents = DocumentRows(tokens, seq_len, documents_end)
        for first in range(0, len(documents), batch_size):
            batch = np.full((batch_size, seq_len + 1), PAD, np.int32)
            for i in range(min(batch_size, len(documents) - first)):
                batch[i] = documents[first + i]
            real = (batch[mine, 1:] != PAD).astype(np.float32)
            yield {"tokens": np.maximum(batch[mine], 0), "mask": real}
        return
    targets = len(tokens) - 1
    numbers = np.arange(batch_size)[mine, None]
    for first in range(0, eval_rows(tokens, seq_len), batch_size):
        index = (first + numbers) * seq_len + np.arange(seq_len + 1)
        yield {
            "tokens": tokens[np.minimum(index, targets)].astype(np.int32),
            "mask": (index[:, 1:] <= targets).astype(np.float32),
        }


def document_rows(tokens: np.ndarray, seq_len: int, end: int) -> np.ndarray:
    """All documents as rows, (documents, seq_len + 1), with `PAD` after short ones."""
    rows = DocumentRows(tokens, seq_len, end)
    return np.stack([rows[i] for i in range(len(rows))])


def process_slice(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that belong to one process."""
    if batch_size % process_count:
        raise DataError(f"batch size {batch_size} is not a multiple of {process_count} processes")
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
