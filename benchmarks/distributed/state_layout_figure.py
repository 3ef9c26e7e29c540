"""Where the parts of W, G, P, R and the moments are, when W is divided over four devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756")
Grid = Sequence[Sequence[int]]  # devices by rows and columns of the parts


class Panel(NamedTuple):
    """One way to divide, and what follows from it."""

    title: str
    weight: Grid
    basis: Grid
    moments: Grid
    each_step: str
    refresh: str
    layers: bool = False


_ROW, _COLUMN = [[0, 1, 2, 3]], [[0], [1], [2], [3]]
_DEALT = "whole matrices are dealt\nout, what is found comes back"
PANELS = (
    Panel(
        "shorter side, m",
        _COLUMN,
        _COLUMN,
        _ROW,
        "R is summed, the low-rank\nupdate gathered: r × n each",
        _DEALT,
    ),
    Panel("longer side, n", _ROW, _COLUMN, _ROW, "P is gathered, m × r\n", _DEALT),
    Panel(
        "both sides, 2 × 2",
        [[0, 1], [2, 3]],
        _COLUMN,
        [[0, 2, 1, 3]],
        "halves of P are gathered, of R\nsummed, of the update gathered",
        _DEALT,
    ),
    Panel("layers", [[0]], [[0]], [[0]], "nothing\n", "nothing", layers=True),
)
# Sizes in the picture.
_M, _N, _R = 1.6, 2.6, 0.55


def draw(path: Path) -> None:
    """Writes the figure as SVG, equal from run to run."""
    settings = {"svg.hashsalt": "state-layout", "font.size": 9, "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4.3))
        for ax, panel in zip(axes, PANELS, strict=True):
            _draw_panel(ax, panel)
        handles = [Rectangle((0, 0), 1, 1, color=c) for c in COLORS]
        names = [f"device {i}" for i in range(len(COLORS))]
        figure.legend(handles, names, ncols=4, loc="upper center", frameon=False)
        figure.subplots_adjust(left=0.01, right=0.99, top=0.86, bottom=0.02, wspace=0.05)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _draw_panel(ax: Axes, panel: Panel) -> None:
    arrays = (
        (panel.basis, (0, 0), (_R, _M)),
        (panel.weight, (0.85, 0), (_N, _M)),
        (panel.moments, (0.85, -0.9), (_N, _R)),
        (panel.moments, (0.85, -1.8), (_N, _R)),
    )
    for copy in range(3, -1, -1) if panel.layers else [0]:
        only = copy if panel.layers else None
        for grid, (x, y), size in arrays:
            _draw_array(ax, grid, (x + 0.1 * copy, y + 0.1 * copy), size, only)
    ax.text(_R / 2, _M + 0.35, "P, m × r", ha="center", va="bottom")
    ax.text(0.85 + _N / 2, _M + 0.35, "W and G, m × n", ha="center", va="bottom")
    ax.text(0.75, -0.9 + _R / 2, "R, M\nr × n", ha="right", va="center")
    ax.text(0.75, -1.8 + _R / 2, "V\nr × n", ha="right", va="center")
    ax.set_title(f"divided: {panel.title}", fontsize=10, fontweight="bold")
    text = f"Each step: {panel.each_step}\n\nAt a refresh: {panel.refresh}"
    ax.text(-0.1, -2.1, text, va="top", linespacing=1.3)
    ax.set(xlim=(-0.2, 4.0), ylim=(-3.7, 2.35), aspect="equal")
    ax.axis("off")


def _draw_array(
    ax: Axes,
    grid: Grid,
    corner: tuple[float, float],
    size: tuple[float, float],
    only: int | None,
) -> None:
    (x, y), (width, height) = corner, size
    rows, columns = len(grid), len(grid[0])
    for i, row in enumerate(grid):
        for j, device in enumerate(row):
            part = (x + j * width / columns, y + height - (i + 1) * height / rows)
            color = COLORS[device if only is None else only]
            ax.add_patch(
                Rectangle(part, width / columns, height / rows, facecolor=color, edgecolor="white")
            )
    ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="black", linewidth=0.8))
