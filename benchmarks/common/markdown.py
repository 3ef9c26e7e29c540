"""Results as Markdown."""

import statistics
from collections.abc import Iterable, Sequence

PLUS_MINUS = "\u00a0±\u00a0"  # Not to be broken into lines.


def table(header: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    """A table; a cell that does not apply is None, and so are those that a row lacks."""
    rows = ([*row, *[None] * (len(header) - len(row))] for row in rows)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "|" + "".join(" |" if cell is None else f" {cell} |" for cell in line) for line in lines
    )


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """The mean and, of several values, their standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean}{PLUS_MINUS}{statistics.stdev(values):.{digits}f}"
