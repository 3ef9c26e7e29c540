"""Local files: the TSV files of GLUE, JSON lines, and CSV."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

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
}
_SUFFIXES = (".tsv", ".jsonl", ".csv")
_Malformed = list[str]
T = TypeVar("T")


def read_directory(task: Task, directory: Path) -> Rows:
    """`train.tsv`, `train.jsonl` or `train.csv`, and those of the splits that are evaluated.

    Raises:
      DataError: names the file and line of what cannot be read.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    raw: dict[str, list[RawRow]] = {}
    malformed: _Malformed = []
    for split in ("train", *task.held_out):
        path = _find(directory, split)
        raw[split] = list(_READERS[path.suffix](task, path, malformed))
        _check_not_empty(raw[split], split, path)
    return make_rows(task, raw, len(malformed))


def read_unlabelled(task: Task, directory: Path) -> dict[str, list[RawRow]]:
    """The files of the splits to predict; labels are not looked at.

    Raises:
      DataError: names the file and line of what cannot be read, malformed rows too: each row of
        the file is a row of the submission.
    """
    found = {}
    for split in task.predicted:
        path, malformed = _find(directory, split), []
        found[split] = list(_READERS[path.suffix](task, path, malformed, labelled=False))
        if malformed:
            raise DataError(f"{malformed[0]}: too few columns")
        _check_not_empty(found[split], split, path)
    return found


def _find(directory: Path, split: str) -> Path:
    candidates = [directory / (stem + end) for stem in _STEMS[split] for end in _SUFFIXES]
    found = [path for path in candidates if path.exists()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{directory}: the {split} split must be one file, got {names}")
    if found:
        return found[0]
    names = ", ".join(path.name for path in candidates)
    raise DataError(f"{directory}: the {split} split is missing (none of {names})")


def _check_not_empty(rows: list[RawRow], split: str, path: Path) -> None:
    if not rows:
        raise DataError(f"{path}: the {split} split has no rows")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line, "" for blank ones."""
    # Not splitlines: text may hold line separators of Unicode.
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        where = f"{path}: line {number}"
        text = decode(line, where, of=" of the line")
        if number == 1:
            text = text.removeprefix("\ufeff")
        yield where, text.rstrip("\r") if text.strip() else ""


def _not_blank(lines: Iterable[tuple[str, T]], labelled: bool) -> Iterator[tuple[str, T]]:
    """The lines that are not blank.

    Without labels no blank one may stand between others: predictions have the numbers of the rows.
    """
    blank = None
    for where, content in lines:
        if not content:
            blank = where
        elif blank is not None and not labelled:
            raise DataError(f"{blank}: a blank line: each line is a row to predict")
        else:
            yield where, content


def _read_tsv(
    task: Task, path: Path, malformed: _Malformed, labelled: bool = True
) -> Iterator[RawRow]:
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
    for where, line in lines:
        cells = line.split("\t")
        # The files of MNLI have columns that their header does not name after those it does.
        if len(cells) < len(names) and task.malformed_rows:
            malformed.append(where)
            continue
        if len(cells) < len(names) or (own and len(cells) > len(names)):
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


def _read_json_lines(
    task: Task, path: Path, _malformed: _Malformed, labelled: bool = True
) -> Iterator[RawRow]:
    for where, line in _not_blank(_lines(path), labelled):
        record = parse_json(line, where)
        yield from_mapping(record, task.json, where, task.name in OPTIONAL_SECOND, labelled)


def _read_csv(
    task: Task, path: Path, _malformed: _Malformed, labelled: bool = True
) -> Iterator[RawRow]:
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
        for where, cells in lines:
            if len(cells) != len(names):
                raise DataError(f"{where}: {len(cells)} columns, expected {len(names)}")
            record = dict(zip(names, cells, strict=True))
            yield from_mapping(record, columns, where, own, labelled)
    except csv.Error as error:
        raise DataError(f"{path}: line {records.line_num}: malformed CSV ({error})") from error


_READERS = {".tsv": _read_tsv, ".jsonl": _read_json_lines, ".csv": _read_csv}
