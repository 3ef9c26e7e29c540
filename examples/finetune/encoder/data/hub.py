"""GLUE through the `datasets` library."""

from typing import Any

from examples.common.errors import DataError
from examples.finetune.encoder.data.rows import Rows, from_mapping, make_rows
from examples.finetune.encoder.data.tasks import Task

NAME = "nyu-mll/glue"


def read_hub(task: Task, name: str = NAME) -> Rows:
    """Reads the configuration of the task of a data set like GLUE on the Hugging Face hub."""
    splits = _load(task, name)
    raw = {}
    for split in ("train", *task.held_out):
        if split not in splits:
            raise DataError(f"{name}: no split {split!r}; it has {', '.join(map(str, splits))}")
        raw[split] = [
            from_mapping(record, task.json, f"{name}: {split} row {number}", False)
            for number, record in enumerate(splits[split], start=1)
        ]
    return make_rows(task, raw)


def _load(task: Task, name: str) -> Any:
    hint = "give the files with --data DIRECTORY"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{task.name}: {hint}, or install the datasets library: python -m pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(name, task.name)
    # Anything from no network to a malformed card, of a dozen types: the message is what counts.
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{name}: cannot be read ({why}); {hint}") from error
