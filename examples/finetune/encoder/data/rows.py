"""Rows of a task, whatever file they come from, and their labels."""

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from examples.common.errors import DataError
from examples.common.text import check_string, found_instead
from examples.finetune.encoder.data.tasks import Columns, Task


class Row(NamedTuple):
    """One or two sentences and what is to be predicted."""

    first: str
    second: str | None
    label: float  # A class from 0 on, or the number of a regression.


class RawRow(NamedTuple):
    """A row as a file has it."""

    where: str  # File and line, for messages.
    first: str
    second: str | None
    label: Any


class Rows(NamedTuple):
    """All splits of a task."""

    labels: tuple[str, ...]  # Names of the classes; empty for a regression.
    splits: dict[str, list[Row]]  # "train" and those that are evaluated.
    left_out: int = 0  # Malformed rows of the official files.
    unused: tuple[str, ...] = ()  # Columns of the user's own files that mean nothing here.


class Unit(NamedTuple):
    """Of the labels of a regression: a model learns ``(label - mean) / size``."""

    mean: float = 0.0
    size: float = 1.0


def unit_of(task: Task, rows: list[Row]) -> Unit:
    """Mean and standard deviation of the user's own labels, which may have any unit.

    Steps of Adam have one size: without it an output near 1000 would take 100,000 of them.

    Raises:
      DataError: if all are equal, or the bias of a saved model, a float32, would round them off.
    """
    if not task.regression or task.range is not None:
        return Unit()
    labels = np.array([row.label for row in rows])
    if not np.ptp(labels):
        raise DataError(f"labels must differ: every training row has {labels[0]:g}")
    unit = Unit(float(np.mean(labels)), float(np.std(labels)))
    if abs(unit.mean) > 1e5 * unit.size:
        raise DataError(
            f"labels must differ by more than 1e-5 of their mean, got {unit.mean:.9g} ± "
            f"{unit.size:.3g}: subtract a number near the mean from all of them"
        )
    return unit


def in_unit(rows: list[Row], unit: Unit) -> list[Row]:
    """Rows with the labels that a model learns."""
    return [row._replace(label=(row.label - unit.mean) / unit.size) for row in rows]


def from_mapping(
    record: Any, columns: Columns, where: str, second_optional: bool, labelled: bool = True
) -> RawRow:
    """A row from a JSON object or a record of a data set; without a label it is None."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object")
    second = columns.second
    if second is not None and second_optional and second not in record:
        second = None
    for name in (columns.first, second):
        if name is not None and not isinstance(record.get(name), str):
            got = found_instead(record, name)
            raise DataError(f'{where}: expected a string "{name}", got {got}')
        if name is not None:
            check_string(record[name], f'{where}: "{name}"')
    if labelled and columns.label not in record:
        got = found_instead(record, columns.label)
        raise DataError(f'{where}: no "{columns.label}", got {got}')
    if labelled:
        _check_label(record[columns.label], columns.label, where)
    return RawRow(
        where,
        record[columns.first],
        None if second is None else record[second],
        record[columns.label] if labelled else None,
    )


def _check_label(label: Any, column: str, where: str) -> None:
    """A label is a number, or text that fits into a line of predictions."""
    if label is None or (isinstance(label, str) and not label.strip()):
        raise DataError(f'{where}: no "{column}"')
    is_number = isinstance(label, int) or (isinstance(label, float) and math.isfinite(label))
    if not is_number and not (isinstance(label, str) and label.strip().isprintable()):
        raise DataError(
            f'{where}: "{column}" must be a finite number or a line of text, got {label!r}'
        )


def make_rows(task: Task, raw: dict[str, list[RawRow]], left_out: int = 0) -> Rows:
    """Labels as numbers.

    Raises:
      DataError: for an empty split, a label that is none of the task's, and a class without a
        training row.
    """
    _check_not_empty(task, raw)
    _check_sentences(raw)
    if task.regression:
        splits = {
            name: [Row(r.first, r.second, _number(task, r)) for r in rows]
            for name, rows in raw.items()
        }
        return Rows((), splits, left_out)
    labels = task.labels or tuple(sorted({_text(row) for row in raw["train"]}))
    if len(labels) < 2:
        raise DataError(
            f"{_file(raw)}: two classes are needed, every training row has the label {labels[0]!r}"
        )
    known = {name: i for i, name in enumerate(labels)}
    if task.labels:  # Then a file may have their numbers as well.
        known = {str(i): i for i in range(len(labels))} | known
    splits = {
        name: [Row(row.first, row.second, _class(row, known, labels)) for row in rows]
        for name, rows in raw.items()
    }
    counts = Counter(row.label for row in splits["train"])
    empty = [name for i, name in enumerate(labels) if not counts[i]]
    if empty:
        raise DataError(f"{_file(raw)}: no training row of the class {', '.join(empty)}")
    return Rows(labels, splits, left_out)


def _file(raw: dict[str, list[RawRow]]) -> str:
    return raw["train"][0].where.partition(": line")[0]


def unlabelled(task: Task, raw: dict[str, list[RawRow]], pairs: bool) -> dict[str, list[Row]]:
    """Rows to predict the labels of; until then these are 0.

    Raises:
      DataError: for an empty split, and for one sentence where the task has `pairs`, or two.
    """
    _check_not_empty(task, raw)
    for rows in raw.values():
        for row in rows:
            if (row.second is not None) != pairs:
                raise DataError(
                    f"{row.where}: expected {'two sentences' if pairs else 'one sentence'}, as in "
                    "the training rows"
                )
    return {name: [Row(r.first, r.second, 0) for r in rows] for name, rows in raw.items()}


def _check_not_empty(task: Task, raw: dict[str, list[RawRow]]) -> None:
    for split, rows in raw.items():
        if not rows:
            raise DataError(f"{task.name}: the {split} split has no rows")


def _check_sentences(raw: dict[str, list[RawRow]]) -> None:
    """Either all rows are pairs or none is."""
    rows = [row for split in raw.values() for row in split]
    for row in rows:
        if (row.second is None) != (rows[0].second is None):
            raise DataError(f"{row.where}: one sentence and two sentences are mixed")


def _text(row: RawRow) -> str:
    # A data set may have classes as 1, as 1.0 or as true; a file has text.
    label = row.label
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


def _class(row: RawRow, known: dict[str, int], labels: tuple[str, ...]) -> int:
    label = _text(row)
    if label not in known:
        raise DataError(
            f"{row.where}: the label {label!r} is none of {', '.join(labels)}"
            + (f" or 0 to {len(labels) - 1}" if "0" in known and "0" not in labels else "")
        )
    return known[label]


def _number(task: Task, row: RawRow) -> float:
    try:
        value = math.nan if isinstance(row.label, bool) else float(row.label)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    low, high = task.range or (-1e18, 1e18)  # Errors are squared in float32.
    if not low <= value <= high:
        raise DataError(
            f"{row.where}: the label {row.label!r} is no number from {low:g} to {high:g}"
        )
    return value
