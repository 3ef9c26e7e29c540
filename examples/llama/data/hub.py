"""Data sets in the Hugging Face format, streamed with the `datasets` library."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from examples.common.errors import DataError, with_type
from examples.llama.data.config import DataConfig
from examples.llama.data.split import HELD_OUT

PREFIX = "hf:"


class HubStreams(NamedTuple):
    """Streams of one data set; `datasets.IterableDataset` each."""

    train: Any
    skip: int
    """Records at the start of `train` that are held out."""
    held_out: tuple[Any, ...]
    """Validation and test, or one bounded stream to be halved between them."""


def is_hub(config: DataConfig) -> bool:
    """Whether the data is one streamed data set."""
    found = [source for source in config.data if source.startswith(PREFIX)]
    if found and len(config.data) > 1:
        raise DataError(f"{found[0]}: a streamed data set cannot be combined with other sources")
    return bool(found)


def open_streams(config: DataConfig) -> HubStreams:
    """Opens `hf:NAME[:CONFIG[:SPLIT]]`; NAME may be a local directory of data files.

    Validation and test come from the data set's splits of these names. If only one of the two
    exists, it is halved between them; if none exists, they are the first documents of the
    training split, which training then skips.
    """
    (source,) = config.data
    name, subset, split, *more = [*source.removeprefix(PREFIX).split(":"), "", ""]
    if not name or any(more):
        raise DataError(f"{source}: expected {PREFIX}NAME[:CONFIG[:SPLIT]]")
    split = split or "train"
    streams = _load(source, name, subset or None)
    if split not in streams:
        raise DataError(f"{source}: no split {split!r}; it has {', '.join(map(str, streams))}")
    train = streams[split]
    count = config.held_out or max(1, round(HELD_OUT * config.max_documents))
    held_out = [streams[key] for key in ("validation", "test") if key in streams and key != split]
    if len(held_out) == 2:
        return HubStreams(train, 0, tuple(stream.take(count) for stream in held_out))
    if len(held_out) == 1:
        return HubStreams(train, 0, (held_out[0].take(2 * count),))
    # Records are counted, not texts: what is taken here is exactly what training skips.
    return HubStreams(train, 2 * count, (train.take(2 * count),))


def read_splits(config: DataConfig) -> tuple[list[str], list[str], list[str]]:
    """Returns the first documents of each split: `max_documents` to train, `held_out` of others."""
    source = config.data[0]
    streams = open_streams(config)
    train = list(texts_of(config, streams.train.skip(streams.skip).take(config.max_documents)))
    held_out = [list(texts_of(config, stream)) for stream in streams.held_out]
    if len(held_out) == 1:
        half = len(held_out[0]) // 2
        held_out = [held_out[0][:half], held_out[0][half:]]
    for name, texts in zip(("train", "validation", "test"), (train, *held_out), strict=True):
        if not texts:
            raise DataError(
                f"{source}: no documents left for the {name} split with {config.max_documents=}"
            )
    return train, held_out[0], held_out[1]


def texts_of(config: DataConfig, stream: Any) -> Iterator[str]:
    """Yields the text of every record that has one."""
    source, column = config.data[0], config.text_column
    for record in _guard(source, iter(stream)):
        text = record.get(column)
        if not isinstance(text, str):
            raise DataError(
                f'{source}: a record without a string "{column}", it has {sorted(record)}: '
                "--text-column names it"
            )
        if text.strip():
            yield text


def _load(source: str, name: str, subset: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: needs the datasets library: python -m pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(name, subset, streaming=True)
    # Anything from no network to a malformed card, of a dozen types: the message is what counts.
    except Exception as error:
        raise DataError(f"{source}: cannot be opened ({with_type(error)})") from error


def _guard(source: str, records: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from records
    except Exception as error:
        raise DataError(f"{source}: cannot be read ({with_type(error)})") from error
