"""Generated text in pages that people write."""

import re
from pathlib import Path

from examples.common.errors import ConfigError

BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"


def fill(text: str, content: str) -> str:
    """``text`` with ``content`` between the two marks, in the place of what was there.

    A text without marks is returned as it is.

    Raises:
      ConfigError: unless there is one of each mark, in order, or none.
    """
    if BEGIN not in text and END not in text:
        return text
    parts = re.split(f"({BEGIN}|{END})", text)
    if parts[1::2] != [BEGIN, END]:
        raise ConfigError(f"needed once each, in this order: {BEGIN} and {END}")
    return f"{parts[0]}{BEGIN}\n{content.strip()}\n{END}{parts[4]}"


def fill_page(path: Path, content: str) -> bool:
    """Fills the block of a page; whether there is such a page with a block."""
    if not path.exists():
        return False
    text = path.read_text()
    try:
        filled = fill(text, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if filled != text:
        path.write_text(filled)
    return BEGIN in text
