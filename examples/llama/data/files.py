"""Documents in local files: plain text, JSON lines, and either of them gzipped."""

import gzip
import json
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from examples.llama.data.errors import DataError

# `.json.gz` holds JSON lines too: it is the name under which C4 is published.
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json.gz")


def read_path(path: Path) -> Iterator[str]:
    """Yields the documents of a file, or of all text files below a directory in sorted order.

    A text file is one document; a line of JSON is one document, its field "text". Line endings
    become "\\n", a byte order mark is dropped, blank JSON lines and empty documents are skipped.
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
        yield from _read_file(file)


def _is_text(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def _read_file(path: Path) -> Iterator[str]:
    json_lines = path.name.removesuffix(".gz").endswith((".json", ".jsonl"))
    empty = True
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for text in _json_documents(path, file) if json_lines else _whole(path, file):
                if text.strip():
                    empty = False
                    yield text.replace("\r\n", "\n")
    # A truncated stream raises EOFError, a damaged one zlib.error.
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: corrupt gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if empty:
        raise DataError(f"{path}: the file is empty")


def _whole(path: Path, file: BufferedIOBase) -> Iterator[str]:
    yield _decode(path, file.read(), 0)


def _json_documents(path: Path, file: BufferedIOBase) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(file, start=1):
        line = _decode(path, raw, offset)
        offset += len(raw)
        if line.strip():
            yield _parse(f"{path}: line {number}", line)


def _decode(path: Path, raw: bytes, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        of = " of the decompressed text" if path.suffix == ".gz" else ""
        raise DataError(f"{path}: invalid UTF-8 at byte {offset + error.start}{of}") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _parse(where: str, line: str) -> str:
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
