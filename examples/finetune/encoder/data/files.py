"""Local files: the TSV files of GLUE, and JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path

from examples.common.errors import DataError
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
_SUFFIXES = (".tsv", ".jsonl")
_Malformed = list[str]


def read_directory(task: Task, directory: Path) -> Rows:
    """`train.tsv` or `train.jsonl`, and those of the splits that are evaluated.

    Raises:
      DataError: names the file and line of what cannot be read.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    raw: dict[str, list[RawRow]] = {}
    malformed: _Malformed = []
    for split in ("train", *task.held_out):
        path = _find(directory, split)
        rows = _read_tsv if path.suffix == ".tsv" else _read_json_lines
        raw[split] = list(rows(task, path, malformed))
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
        rows = _read_tsv if path.suffix == ".tsv" else _read_json_lines
        found[split] = list(rows(task, path, malformed, labelled=False))
        if malformed:
            raise DataError(f"{malformed[0]}: too few columns")
    return found


def _find(directory: Path, split: str) -> Path:
    candidates = [directory / (stem + end) for stem in _STEMS[split] for end in _SUFFIXES]
    for path in candidates:
        if path.exists():
            return path
    names = ", ".join(path.name for path in candidates)
    raise DataError(f"{directory}: the {split} split is missing (none of {names})")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where a line stands, and the line; blank lines are skipped."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    # Not splitlines: text may hold line separators of Unicode.
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{path}: line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: invalid UTF-8 at byte {error.start} of the line") from error
        if text.strip():
            yield where, text.rstrip("\r")


def _read_tsv(
    task: Task, path: Path, malformed: _Malformed, labelled: bool = True
) -> Iterator[RawRow]:
    # Quotes mean nothing in these files.
    lines = _lines(path)
    if task.header or not labelled:  # GLUE's test files all have one.
        where, header = next(lines, (str(path), ""))
        names = header.split("\t")
    else:
        where, names = str(path), list(task.tsv_order)
    columns = _known_columns(task, names, where, labelled)
    for where, line in lines:
        cells = line.split("\t")
        # The files of MNLI have columns that their header does not name after those it does.
        if len(cells) < len(names):
            if not task.malformed_rows:
                raise DataError(f"{where}: {len(cells)} columns, expected {len(names)}")
            malformed.append(where)
            continue
        record = dict(zip(names, cells, strict=False))
        yield from_mapping(record, columns, where, task.name in OPTIONAL_SECOND, labelled)


def _known_columns(task: Task, names: list[str], where: str, labelled: bool) -> Columns:
    """GLUE's names of the columns, or those of the data sets library."""
    optional = {None, "sentence2"} if task.name in OPTIONAL_SECOND else {None}
    if not labelled:
        optional |= {task.tsv.label, task.json.label}
    for columns in (task.tsv, task.json):
        if set(columns) - optional <= set(names):
            return columns
    wanted = ", ".join(name for name in task.tsv if name is not None and name not in optional)
    raise DataError(f"{where}: expected the columns {wanted}; got {', '.join(names)}")


def _read_json_lines(
    task: Task, path: Path, _malformed: _Malformed, labelled: bool = True
) -> Iterator[RawRow]:
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        # ValueError covers JSONDecodeError and integers of too many digits.
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: malformed JSON ({error})") from error
        yield from_mapping(record, task.json, where, task.name in OPTIONAL_SECOND, labelled)
