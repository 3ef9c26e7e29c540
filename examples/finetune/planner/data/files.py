"""JSON files, and what they are expected to contain."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.common.errors import DataError
from examples.common.text import decode, found_instead, parse_json, read_bytes

_KINDS = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}


@contextmanager
def located(where: str) -> Generator[None]:
    """Add the place to the message of a ValueError, and raise it as a DataError."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return _parse(_read(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields where a line stands and its content; blank lines are skipped."""
    # Not splitlines: JSON text may hold line separators of Unicode.
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            yield where, _parse(line, where)


def entry(record: Any, key: str, kind: type, where: str) -> Any:
    """The value of `key`, which must be there and of this kind."""
    if not isinstance(record, dict) or not isinstance(record.get(key), kind):
        got = found_instead(record, key)
        raise DataError(f'{where}: expected an object with {_KINDS[kind]} "{key}", got {got}')
    return record[key]


def expect(value: Any, kind: type, what: str) -> Any:
    """`value`, which must be of this kind."""
    if not isinstance(value, kind):
        raise DataError(f"{what} must be {_KINDS[kind]}, got {_short(value)}")
    return value


def optional(record: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of `key`, which must be of this kind; an empty one if there is none."""
    value = record.get(key)
    return kind() if value is None else expect(value, kind, f'{where}: "{key}"')


def _read(path: Path) -> bytes:
    content = read_bytes(path)
    if not content.strip():
        raise DataError(f"{path}: the file is empty")
    return content


def _parse(content: bytes, where: str) -> Any:
    # Keys are ids of records, or arguments of a call.
    return parse_json(decode(content, where).removeprefix("\ufeff"), where, unique_keys=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."
