"""One style of all figures: 9 points at the width of a page, lines that differ without colours."""

from typing import Any

import matplotlib
from cycler import cycler

PAGE = 7.7  # Inches: figures of this width are not scaled on a page, and 9 points stay 9 points.

COLOURS = ("black", "tab:red", "tab:blue", "tab:orange", "tab:green", "tab:purple")
DASHES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
GREYS = ("0.15", "0.4", "0.6", "0.75", "0.88")  # Parts of bars, from the dark to the light.

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 9,
    "legend.fontsize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=DASHES),
    "figure.facecolor": "white",  # Not transparent: a page may be dark.
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
}
in_style = matplotlib.rc_context(STYLE)
"""Decorator of functions that draw."""
