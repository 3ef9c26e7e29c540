"""GLUE through the `datasets` library."""

from typing import Any

from examples.common.errors import DataError, with_type
from examples.finetune.encoder.data.rows import RawRow, Rows, from_mapping, make_rows
from examples.finetune.encoder.data.tasks import Task

NAME = "nyu-mll/glue"
# Of splits that are data sets of their own: its name, and the split of it.
_ELSEWHERE = {"diagnostic": ("ax", "test")}


def read_hub(task: Task) -> Rows:
    """Reads the configuration of GLUE on the Hugging Face hub that is the task."""
    return make_rows(task, _read(task, ("train", *task.held_out), True))


def read_hub_unlabelled(task: Task) -> dict[str, list[RawRow]]:
    """The splits to predict; their labels, -1 in GLUE, are not looked at."""
    return _read(task, tuple(task.submission), False)


def _read(task: Task, wanted: tuple[str, ...], labelled: bool) -> dict[str, list[RawRow]]:
    loaded: dict[str, Any] = {}
    raw = {}
    for split in wanted:
        part, at = _ELSEWHERE.get(split, (task.name, split))
        splits = loaded[part] = loaded[part] if part in loaded else _load(part)
        if at not in splits:
            raise DataError(f"{NAME}: no split {at!r}; it has {', '.join(map(str, splits))}")
        raw[split] = [
            from_mapping(record, task.json, f"{NAME}: {split} row {number}", False, labelled)
            for number, record in enumerate(splits[at], start=1)
        ]
    return raw


def _load(part: str) -> Any:
    hint = "give the files with --data DIRECTORY"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{part}: {hint}, or install the datasets library: python -m pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(NAME, part)
    # Anything from no network to a malformed card, of a dozen types: the message is what counts.
    except Exception as error:
        raise DataError(f"{NAME}: cannot be read ({with_type(error)}); {hint}") from error
