"""Rows of a task: from a directory of files, from a hub, or those of `make finetune`."""

from pathlib import Path

from examples.common.errors import DataError
from examples.finetune.encoder.data.files import read_directory, read_unlabelled
from examples.finetune.encoder.data.hub import read_hub, read_hub_unlabelled
from examples.finetune.encoder.data.rows import (
    Row as Row,
    Rows as Rows,
    Unit as Unit,
    in_unit as in_unit,
    unit_of as unit_of,
    unlabelled,
)
from examples.finetune.encoder.data.snippets import ARCHIVE, read_snippets
from examples.finetune.encoder.data.tasks import TASKS as TASKS, Task as Task


def read_rows(task: Task, data: Path | None) -> Rows:
    """The rows of a task.

    Args:
      task: what to read.
      data: a directory of files; the archive of the movie snippets; or None: GLUE from the hub.
    """
    if task.name == "movie-snippets":
        return read_snippets(data or ARCHIVE)
    if data is not None:
        return read_directory(task, data)
    if task.name.startswith("own"):
        raise DataError(f"--task {task.name} needs --data DIRECTORY with train and dev files")
    return read_hub(task)


def read_predicted(task: Task, data: Path | None, rows: Rows) -> dict[str, list[Row]]:
    """The rows whose labels --predict writes, from where `rows` came from; labels are 0.

    Raises:
      DataError: see `read_rows`; for files that are missing.
    """
    if task.name == "movie-snippets":
        return {name: rows.splits[name] for name in task.submission}
    raw = read_hub_unlabelled(task) if data is None else read_unlabelled(task, data)
    return unlabelled(task, raw, rows.splits["train"][0].second is not None)
