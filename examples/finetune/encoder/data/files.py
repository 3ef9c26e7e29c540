"""Local files: the TSV files of GLUE, JSON lines, and CSV."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from examples.common.config import INT32
from examples.common.errors import DataError
from examples.common.text import decode, parse_json, read_bytes, shown_name
from examples.finetune.encoder.data.rows import RawRow, Rows, from_mapping, make_rows
from examples.finetune.encoder.data.tasks import OPTIONAL_SECOND, Columns, Task

# Of each split, in the order in which they are looked for.
_STEMS = {
    "train": ("train",),
    "validation": ("dev", "validation"),
    "validation_matched": ("dev_matched", "validation_matched"),
    "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
    "test": ("test",),
    "test_matched": ("test_matched",),
    "test_mismatched": ("test_mismatched",),
    "diagnostic": ("diagnostic", "AX"),
}
_SUFFIXES = (".tsv", ".jsonl", ".csv")
T = TypeVar("T")


class _Found(NamedTuple):
    """Malformed rows and unused columns of the files."""

    malformed: list[str]  # Files and lines.
    unused: dict[str, None]  # Columns.


def read_directory(task: Task, directory: Path) -> Rows:
    """`train.tsv`, `train.jsonl` or `train.csv`, and those of the splits that are evaluated.

    Raises:
      DataError: names the file and line of what cannot be read.
    """
    if not directory.is_dir():
        what = "a file" if directory.exists() else "no such directory"
        raise DataError(f"{directory}: {what}; --data is the directory of the splits' files")
    raw: dict[str, list[RawRow]] = {}
    others = _Found([], {})
    for split in ("train", *task.held_out):
        path = _find(directory, split)
        raw[split] = list(_READERS[path.suffix](task, path, others))
        _check_not_empty(raw[split], split, path)
    return make_rows(task, raw, len(others.malformed))._replace(unused=tuple(others.unused))


def read_unlabelled(task: Task, directory: Path) -> dict[str, list[RawRow]]:
    """The files of the splits to predict; labels are not looked at.

    Raises:
      DataError: names the file and line of what cannot be read, malformed rows too: each row of
        the file is a row of the submission.
    """
    found = {}
    for split in task.submission:
        if split == task.diagnostic and not _there(directory, split):
            continue
        path, others = _find(directory, split), _Found([], {})
        found[split] = list(_READERS[path.suffix](task, path, others, labelled=False))
        if others.malformed:
            raise DataError(f"{others.malformed[0]}: too few columns or too many")
        _check_not_empty(found[split], split, path)
    return found


def _names(split: str) -> list[str]:
    return [stem + end for stem in _STEMS[split] for end in _SUFFIXES]


def _there(directory: Path, split: str) -> list[Path]:
    return [directory / name for name in _names(split) if (directory / name).exists()]


def _find(directory: Path, split: str) -> Path:
    found = _there(directory, split)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{directory}: the {split} split must be one file, got {names}")
    if found:
        return found[0]
    names = ", ".join(_names(split))
    raise DataError(f"{directory}: the {split} split is missing (none of {names})")


def _check_not_empty(rows: list[RawRow], split: str, path: Path) -> None:
    if not rows:
        raise DataError(f"{path}: the {split} split has no rows")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line."""
    # Not splitlines: text may hold line separators of Unicode.
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        where = f"{path}: line {number}"
        text = decode(line, where, of=" of the line")
        if number == 1:
            text = text.removeprefix("\ufeff")
        yield where, text.rstrip("\r")


def _not_blank(lines: Iterable[tuple[str, T]], labelled: bool) -> Iterator[tuple[str, T]]:
    """The lines that are not empty; a tab is a row of empty cells.

    Without labels no empty one may stand between others: predictions have the numbers of the rows.
    """
    blank = None
    for where, content in lines:
        if not content:
            blank = where
        elif blank is not None and not labelled:
            raise DataError(f"{blank}: a blank line: each line is a row to predict")
        else:
            yield where, content


def _read_tsv(task: Task, path: Path, others: _Found, labelled: bool = True) -> Iterator[RawRow]:
    # Quotes mean nothing in these files.
    lines = _not_blank(_lines(path), labelled)
    if task.header or not labelled:  # GLUE's test files all have one.
        where, header = next(lines, (str(path), ""))
        if not header:
            raise DataError(f"{path}: the file is empty")
        names = header.split("\t")
    else:
        where, names = str(path), list(task.tsv_order)
    columns = _known_columns(task, names, where, labelled)
    own = task.name in OPTIONAL_SECOND
    _note_unused(task, names, others)
    for where, line in lines:
        cells = line.split("\t")
        if len(cells) < len(names) or (len(cells) > len(names) and not task.unnamed_columns):
            if task.malformed_rows:
                others.malformed.append(where)
                continue
            raise DataError(f"{where}: {len(cells)} columns, expected {len(names)}")
        record = dict(zip(names, cells, strict=False))
        yield from_mapping(record, columns, where, own, labelled)


def _known_columns(task: Task, names: list[str], where: str, labelled: bool) -> Columns:
    """GLUE's names of the columns, or those of the data sets library."""
    optional = {None, "sentence2"} if task.name in OPTIONAL_SECOND else {None}
    if not labelled:
        optional |= {task.tsv.label, task.json.label}
    for columns in (task.tsv, task.json):
        if set(columns) - optional <= set(names):
            twice = [name for name in columns if names.count(str(name)) > 1]
            if twice:
                raise DataError(f"{where}: the column {twice[0]} is there twice")
            return columns
    wanted = ", ".join(name for name in task.tsv if name is not None and name not in optional)
    got = ", ".join(map(shown_name, names))
    got = got if len(got) <= 80 else f"{got[:80]}..."
    raise DataError(f"{where}: expected the columns {wanted}; got {got}")


def _note_unused(task: Task, names: Any, others: _Found) -> None:
    """Note the names of the user's own columns that no column of the task has."""
    if task.name in OPTIONAL_SECOND and isinstance(names, (list, dict)):
        others.unused.update((str(name), None) for name in names if name not in task.json)


def _read_json_lines(
    task: Task, path: Path, others: _Found, labelled: bool = True
) -> Iterator[RawRow]:
    lines = ((where, line.strip()) for where, line in _lines(path))
    for where, line in _not_blank(lines, labelled):
        record = parse_json(line, where, unique_keys=True)
        _note_unused(task, record, others)
        yield from_mapping(record, task.json, where, task.name in OPTIONAL_SECOND, labelled)


def _read_csv(task: Task, path: Path, others: _Found, labelled: bool = True) -> Iterator[RawRow]:
    text = decode(read_bytes(path), str(path)).removeprefix("\ufeff")
    # By records, not by lines: a quoted cell may hold line ends.
    csv.field_size_limit(INT32 - 1)  # By default a cell of more than 131,072 characters fails.
    records = csv.reader(io.StringIO(text, newline=""), strict=True)
    own = task.name in OPTIONAL_SECOND
    try:
        numbered = ((f"{path}: line {records.line_num}", cells) for cells in records)
        lines = _not_blank(numbered, labelled)
        where, names = next(lines, (str(path), []))
        if not names:
            raise DataError(f"{path}: the file is empty")
        columns = _known_columns(task, names, where, labelled)
        _note_unused(task, names, others)
        for where, cells in lines:
            if len(cells) != len(names):
                raise DataError(f"{where}: {len(cells)} columns, expected {len(names)}")
            record = dict(zip(names, cells, strict=True))
            yield from_mapping(record, columns, where, own, labelled)
    except csv.Error as error:
        raise DataError(f"{path}: line {records.line_num}: malformed CSV ({error})") from error


_READERS = {".tsv": _read_tsv, ".jsonl": _read_json_lines, ".csv": _read_csv}
