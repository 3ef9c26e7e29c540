"""GLUE through the `datasets` library."""

from typing import Any

from examples.common.errors import DataError, with_type
from examples.finetune.encoder.data.rows import RawRow, Rows, from_mapping, make_rows
from examples.finetune.encoder.data.tasks import Task

NAME = "nyu-mll/glue"
# Of splits that are data sets of their own: its name, and the split of it.
_ELSEWHERE = {"diagnostic": ("ax", "test")}


def read_hub(task: Task, name: str = NAME) -> Rows:
    """Reads the configuration of the task of a data set like GLUE on the Hugging Face hub."""
    return make_rows(task, _read(task, name, ("train", *task.held_out), True))


def read_hub_unlabelled(task: Task, name: str = NAME) -> dict[str, list[RawRow]]:
    """The splits to predict; their labels, -1 in GLUE, are not looked at."""
    return _read(task, name, tuple(task.submission), False)


def _read(
    task: Task, name: str, wanted: tuple[str, ...], labelled: bool
) -> dict[str, list[RawRow]]:
    loaded: dict[str, Any] = {}
    raw = {}
    for split in wanted:
        part, at = _ELSEWHERE.get(split, (task.name, split))
        splits = loaded[part] = loaded[part] if part in loaded else _load(part, name)
        if at not in splits:
            raise DataError(f"{name}: no split {at!r}; it has {', '.join(map(str, splits))}")
        raw[split] = [
            from_mapping(record, task.json, f"{name}: {split} row {number}", False, labelled)
            for number, record in enumerate(splits[at], start=1)
        ]
    return raw


def _load(part: str, name: str) -> Any:
    hint = "give the files with --data DIRECTORY"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{part}: {hint}, or install the datasets library: python -m pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(name, part)
    # Anything from no network to a malformed card, of a dozen types: the message is what counts.
    except Exception as error:
        raise DataError(f"{name}: cannot be read ({with_type(error)}); {hint}") from error
