"""Training batches straight from a streamed data set, tokenised on the way."""

from typing import Any

import grain
import numpy as np

from examples.common.errors import DataError
from examples.llama.data import hub
from examples.llama.data.config import DataConfig
from examples.llama.data.packing import document_row, process_slice
from examples.llama.data.splits import Splits
from examples.llama.data.tokenizer import TextTokenizer, encode


def make_streaming_iterator(
    config: DataConfig,
    splits: Splits,
    *,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Yields {"tokens": int32 (batch_size // process_count, seq_len + 1)} without end.

    Documents come in the order of the data set, or with `config.shuffle` shuffled by `seed` within
    windows of it, again from its start when it ends. Each process
    reads its own share of the shards (or of the documents, where the shards do not divide), so
    batches depend on the number of processes. The state is the position in the data set and the
    tokens left over from the last row: `set_state` continues with identical batches.
    """
    mine = process_slice(batch_size, process_index, process_count)
    documents: grain.IterDataset = _Documents(config, process_index, process_count)
    if config.shuffle:
        documents = grain.experimental.WindowShuffleIterDataset(
            documents, window_size=config.shuffle, seed=seed
        )
    tokenizer = TextTokenizer(splits.tokenizer, splits.end_of_text)
    tokens = documents.map(lambda text: encode(tokenizer, [text]))
    rows = (
        _PackRows(tokens, seq_len)
        if config.rows == "packed"
        else tokens.map(lambda document: document_row(document, seq_len))
    )
    return iter(
        rows.batch(mine.stop - mine.start).map(lambda batch: {"tokens": batch.astype(np.int32)})
    )


class _Documents(grain.IterDataset):
    """The texts of a data set, without end."""

    def __init__(self, config: DataConfig, process_index: int, process_count: int):
        super().__init__()
        self._config = config
        self._process = (process_index, process_count)

    def __iter__(self) -> "_DocumentIterator":
        streams = hub.open_streams(self._config)
        # `datasets` is an extra; by now it is known to be there.
        from datasets.distributed import split_dataset_by_node

        # Shared out before it is skipped: the other way round, `datasets` shares out the skipping
        # too, and held-out documents would enter training. A process may so skip a few more.
        share = split_dataset_by_node(streams.train, *self._process).skip(streams.skip)
        return _DocumentIterator(self._config, share)


class _DocumentIterator(grain.DatasetIterator):
    def __init__(self, config: DataConfig, stream: Any):
        super().__init__()
        self._config = config
        self._stream = stream
        self._start = stream.state_dict()
        self._texts = hub.texts_of(config, stream)

    def __next__(self) -> str:
        text = next(self._texts, None)
        if text is None:
            self.set_state(self._start)
            text = next(self._texts, None)
        if text is None:
            raise DataError(f"{self._config.data[0]}: no documents for this process")
        return text

    def get_state(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)
        self._texts = hub.texts_of(self._config, self._stream)


class _PackRows(grain.IterDataset):
    """Token arrays of any length into rows of `seq_len + 1` that share one token."""

    def __init__(self, parent: grain.IterDataset, seq_len: int):
        super().__init__(parent)
        self._seq_len = seq_len

    def __iter__(self) -> "_PackIterator":
        return _PackIterator(iter(self._parent), self._seq_len)


class _PackIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, seq_len: int):
        super().__init__(parent)
        self._seq_len = seq_len
        self._rest = np.zeros(0, np.int32)

    def __next__(self) -> np.ndarray:
        while len(self._rest) < self._seq_len + 1:
            self._rest = np.concatenate([self._rest, next(self._parent)])
        row, self._rest = self._rest[: self._seq_len + 1], self._rest[self._seq_len :]
        return row

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "rest": self._rest.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._rest = np.asarray(state["rest"], np.int32)
