"""Documents in local files: plain text, JSON lines, and either of them gzipped."""

import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path

from examples.common.errors import DataError

# `.json.gz` holds JSON lines too: it is the name under which C4 is published.
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json.gz")


def read_path(path: Path, *, skip_bad_lines: bool = False) -> Iterator[str]:
    r"""Yields the documents of a file, or of all text files below a directory in sorted order.

    A text file is one document; a line of JSON is one document, its field "text". Line endings
    become "\n", a byte order mark is dropped, blank JSON lines and empty documents are skipped.
    With `skip_bad_lines` so are lines that are not UTF-8 or not such JSON: a warning for each file
    says how many, and what is wrong with the first.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _is_text(p))
        if not files:
            raise DataError(f"{path}: no {', '.join(SUFFIXES)} file in this directory")
    elif not path.exists():
        raise DataError(f"{path}: no such file or directory")
    elif not _is_text(path):
        raise DataError(f"{path}: unknown extension (expected {', '.join(SUFFIXES)})")
    else:
        files = [path]
    for file in files:
        yield from _read_file(file, skip_bad_lines)


def _is_text(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def _read_file(path: Path, skip_bad_lines: bool) -> Iterator[str]:
    json_lines = path.name.removesuffix(".gz").endswith((".json", ".jsonl"))
    bad: list[DataError] | None = [] if skip_bad_lines else None
    empty = True
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            lines = _lines(path, file, _parse if json_lines else _keep, bad)
            for text in lines if json_lines else ["".join(lines)]:
                if text.strip():
                    empty = False
                    yield text.replace("\r\n", "\n")
    # A truncated stream raises EOFError, a damaged one zlib.error.
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: corrupt gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if bad:
        warnings.warn(f"{len(bad)} bad line(s) skipped, the first: {bad[0]}", stacklevel=2)
    if empty:
        raise DataError(f"{path}: the file is empty")


def _lines(
    path: Path, file: BufferedIOBase, read: Callable[[str, str], str], bad: list[DataError] | None
) -> Iterator[str]:
    """What `read` makes of each line; what is wrong with others is added to `bad`, if given."""
    offset = 0
    for number, raw in enumerate(file, start=1):
        where = f"{path}: line {number}"
        try:
            yield read(where, _decode(where, path, raw, offset))
        except DataError as error:
            if bad is None:
                raise
            bad.append(error)
        offset += len(raw)


def _decode(where: str, path: Path, raw: bytes, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        of = " of the decompressed text" if path.suffix == ".gz" else ""
        raise DataError(f"{where}: invalid UTF-8 at byte {offset + error.start}{of}") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _keep(where: str, line: str) -> str:
    return line


def _parse(where: str, line: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    # ValueError covers JSONDecodeError and integers of too many digits.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: malformed JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f'{where}: expected an object with a string "text"')
    try:
        record["text"].encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f'{where}: "text" holds half a surrogate pair') from error
    return record["text"]
