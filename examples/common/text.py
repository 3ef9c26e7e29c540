"""Text of files: UTF-8 without NUL, with messages that name what else it is."""

import json
import shlex
import unicodedata
from pathlib import Path
from typing import Any

from examples.common.errors import DataError

# The first two bytes of UTF-32's marks are those of UTF-16.
_MARKS = {
    "UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
    "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
}


def refuse_wide(start: bytes, path: Path) -> None:
    """Raise a DataError if a file that starts so is UTF-16 or UTF-32."""
    for name, marks in _MARKS.items():
        if start.startswith(marks):
            file, convert = shlex.quote(str(path)), f"iconv -f {name} -t UTF-8"
            command = f"{convert} {file}"
            if path.suffix == ".gz":
                command, path = f"gzip -dc {file} | {convert}", path.with_suffix("")
            raise DataError(f"{file}: {name}, expected UTF-8: {command} > new{path.suffix}")


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises a DataError if it cannot be read, or is UTF-16 or UTF-32."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    refuse_wide(content, path)
    return content


def parse_json(text: str, where: str, *, unique_keys: bool = False) -> Any:
    """The value of JSON; raises a DataError with its place if it is malformed.

    Of equal keys the last one counts, as in Python, unless they must be unique.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    # ValueError covers JSONDecodeError and integers of too many digits.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: malformed JSON ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def decode(raw: bytes, where: str, *, start: int = 0, of: str = "", remedy: str = "") -> str:
    """The text of UTF-8 without NUL.

    Args:
      raw: bytes of a line, say.
      where: their place, for messages.
      start: number of the first of them, for messages.
      of: what `start` is counted in: " of the line".
      remedy: what the user may do instead of converting the file.

    Raises:
      DataError: for other bytes.
    """
    if b"\0" in raw:
        raise DataError(
            f"{where}: {raw.count(0)} NUL byte(s), the first at byte {start + raw.index(0)}{of}: "
            f"not text, or UTF-16 without a byte order mark{_also('; ', remedy)}"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: invalid UTF-8 at byte {start + error.start}{of}: Latin-1 or another "
            f"encoding; convert the file{_also(', or ', remedy)}"
        ) from error


def found_instead(record: Any, name: str) -> str:
    """For messages: the content of a field of JSON, or the fields that there are instead."""
    if isinstance(record, dict) and name not in record:
        names = ", ".join(map(shown_name, record))
        return f"the fields {_short(names)}" if names else "no fields"
    is_object = isinstance(record, dict)
    text = _short(json.dumps(record[name] if is_object else record, default=repr))
    return f'"{name}": {text}' if is_object else text


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def shown_name(name: str) -> str:
    """A name in a list of names: in quotes if it has blanks that would not be seen, or nothing."""
    return name if name and name.isprintable() and name == " ".join(name.split()) else repr(name)


def printable(text: str) -> str:
    """Without control characters, which a model may emit and a terminal would obey."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )


def check_string(text: str, what: str, *, remedy: str = "") -> None:
    """Raise a DataError if a string of JSON or Parquet has characters that UTF-8 text has not."""
    if has_half_pair(text):
        raise DataError(f"{what} holds half a surrogate pair")
    if "\0" in text:
        raise DataError(f"{what} holds {text.count(chr(0))} NUL character(s){_also(': ', remedy)}")


def has_half_pair(text: str) -> bool:
    """Whether a string has half a surrogate pair, which no file of UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _also(join: str, remedy: str) -> str:
    return f"{join}{remedy}" if remedy else ""
