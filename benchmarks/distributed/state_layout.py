"""Bytes that each device holds and sends when weights are sharded, from shapes alone.

``python -m benchmarks.distributed.state_layout`` prints the tables of docs/sharding.md and draws
its figure. Memory follows from ``ng.training.state_shardings``, bytes sent from the formulas of
that page: in a ring of k devices each sends (k − 1) / k of an array for an all-gather or a
reduce-scatter, and twice as much for an all-reduce. All numbers have two bytes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
from jax.sharding import AbstractMesh, NamedSharding
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import natgalore_jax as ng
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.markdown import table
from benchmarks.common.shapes import BF16, LLAMA_RANKS, PaperSize, llama_shapes
from examples.common.figures import PAGE, STYLE

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "state-layout.svg"
DEVICES = 8


class Scheme(NamedTuple):
    """Numbers of devices over which layers, shorter and longer sides of matrices are sharded."""

    name: str
    layers: int = 1
    shorter: int = 1
    longer: int = 1
    low_rank_gradients: bool = False  # as ng.training.data_parallel_step exchanges them


SCHEMES = (
    Scheme("nothing"),
    Scheme("nothing, low-rank gradients", low_rank_gradients=True),
    Scheme("shorter side", shorter=DEVICES),
    Scheme("longer side", longer=DEVICES),
    Scheme("both sides, 2 × 4", shorter=2, longer=4),
    Scheme("layers", layers=DEVICES),
)


class PerDevice(NamedTuple):
    """Bytes of one device."""

    weights: int
    bases: int
    rest: int  # of the optimizer's state: moments, Fisher entries, counters
    optimizer_sends: float  # in a step without a refresh, beside norms
    training_sends: float | None  # weights and gradients; None: that depends on the model


def main(sizes: tuple[PaperSize, ...] = ("350m", "7b"), figure: Path = FIGURE) -> None:
    """Print the tables, draw the figure.

    Args:
      sizes: presets of ``examples.llama``, at the ranks of the GaLore paper.
      figure: where the figure goes.
    """
    for size in sizes:
        print(f"{size}, rank {LLAMA_RANKS[size]}:\n\n{layout_table(size)}\n")
    draw(figure)


def layout_table(size: str) -> str:
    """Markdown, GB of each device."""
    header = ("sharded", "weights", "bases", "moments", "the optimizer sends", "training sends")
    rows = []
    for scheme in SCHEMES:
        values = per_device(llama_shapes(size), scheme, size)
        rows.append([scheme.name, *("–" if x is None else f"{x / 1e9:.3f}" for x in values)])
    return table(header, rows)


def per_device(params: Any, scheme: Scheme, size: str) -> PerDevice:
    """Of a model with stacked layers in bfloat16, at the rank of the GaLore papers."""
    tx = ng.natural_galore_adamw(1e-2, rank=LLAMA_RANKS[size])
    mesh = AbstractMesh(
        (scheme.layers, scheme.shorter, scheme.longer), ("layers", "shorter", "longer")
    )
    at = jax.tree.map(lambda x: NamedSharding(mesh, spec(x.shape)), params)
    state_at = ng.training.state_shardings(tx, params, at)
    state = jax.eval_shape(tx.init, params)
    sizes = jax.tree.map(_bytes, state, state_at)
    paths = jax.tree_util.tree_leaves_with_path(sizes)
    bases = sum(x for path, x in paths if ".basis" in jax.tree_util.keystr(path))
    report = ng.memory_report(tx, params)
    hidden: list[tuple[Any, ...]] = [
        (p.layers, *sorted(p.shape[-2:]), p.rank) for p in report.parameters if p.projected
    ]
    rest = sum(math.prod(p.shape) for p in report.parameters if not p.projected)
    sends = [
        (layers * optimizer_sends(scheme, m, n, r), layers * training_sends(scheme, m, n, r))
        for layers, m, n, r in hidden
    ]
    training = sum(x for _, x in sends) + training_sends(scheme, 1, rest, 1)
    return PerDevice(
        weights=sum(jax.tree.leaves(jax.tree.map(_bytes, params, at))),
        bases=bases,
        rest=sum(x for _, x in paths) - bases,
        optimizer_sends=BF16 * sum(x for x, _ in sends),
        training_sends=BF16 * training if scheme.layers == 1 else None,
    )


def spec(shape: Sequence[int]) -> jax.P:
    """Of stacked matrices as the scheme says; embedding and head by tokens over all devices."""
    if len(shape) == 3:
        sides = ("shorter", "longer") if shape[1] <= shape[2] else ("longer", "shorter")
        return jax.P("layers", *sides)
    if len(shape) == 2 and max(shape) > 1000 * DEVICES:
        all_axes = ("layers", "shorter", "longer")
        return jax.P(all_axes) if shape[0] > shape[1] else jax.P(None, all_axes)
    return jax.P()


def optimizer_sends(scheme: Scheme, m: int, n: int, r: int) -> float:
    """Numbers that a device sends for one matrix whose shorter side m is projected.

    P (m × r), sharded like the longer side, is gathered. R (r × n) is reduce-scattered over the
    devices that the shorter side is sharded over, and the low-rank update is gathered from them.
    """
    basis = _share(scheme.longer) * m * r / scheme.shorter
    low_rank = 2 * _share(scheme.shorter) * r * n / scheme.longer
    return basis + low_rank


def training_sends(scheme: Scheme, m: int, n: int, r: int) -> float:
    """Numbers that a device sends for the weights and the gradient of one matrix.

    The gradient of a replicated weight is summed. A sharded weight is gathered in the forward and
    in the backward pass, and its gradient is reduce-scattered.
    """
    if scheme.shorter * scheme.longer == 1:
        return 2 * _share(DEVICES) * (r * n if scheme.low_rank_gradients else m * n)
    return 3 * _share(DEVICES) * m * n


def _share(devices: int) -> float:
    return (devices - 1) / devices


def _bytes(x: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize


# From the dark to the light, so that they differ in grey.
COLORS = ("#1f4e79", "#d9603b", "#7fb86a", "#f2d77c")
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
    """Write the figure as SVG, equal from run to run."""
    settings = STYLE | {"svg.hashsalt": "state-layout", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(PAGE, 7.6))
        for ax, panel in zip(figure.subplots(2, 2).ravel(), PANELS, strict=True):
            _draw_panel(ax, panel)
        handles = [Rectangle((0, 0), 1, 1, color=c) for c in COLORS]
        names = [f"device {i}" for i in range(len(COLORS))]
        figure.legend(handles, names, ncols=4, loc="upper center", frameon=False)
        figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.01, wspace=0.05)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


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
    ax.set_title(f"divided: {panel.title}", fontweight="bold")
    text = f"Each step: {panel.each_step}\n\nAt a refresh: {panel.refresh}"
    ax.text(-0.1, -2.1, text, va="top", linespacing=1.3)
    ax.set(xlim=(-0.5, 4.2), ylim=(-3.7, 2.35), aspect="equal")
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


if __name__ == "__main__":
    run_from_command_line(main)
