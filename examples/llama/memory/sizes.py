"""Sizes in bytes, as people write them."""

import re

_DECIMAL = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of "24GB" (24 · 10⁹), "24GiB" (24 · 2³⁰), "512 MB" or "1000".

    Raises:
      ValueError: if it is not a number of at most 18 digits with one of these units.
    """
    match = _SIZE.fullmatch(text)
    units = {name.lower(): size for name, size in {"": 1, **_DECIMAL, **_BINARY}.items()}
    unit = match[2].lower() if match else ""
    if not match or unit not in units:
        names = ", ".join((*_DECIMAL, *_BINARY))
        raise ValueError(f"a size is a number and one of {names}, got {text!r}")
    return int(float(match[1]) * units[unit])


def unit_of(size: int) -> tuple[str, int]:
    """The decimal unit for a size, and its bytes."""
    units = reversed(_DECIMAL.items())
    return next(((unit, scale) for unit, scale in units if abs(size) >= scale), ("B", 1))


def format_bytes(size: int) -> str:
    """In decimal units: 1.23 GB."""
    unit, scale = unit_of(size)
    return f"{size / scale:.2f} {unit}" if scale > 1 else f"{size} B"
