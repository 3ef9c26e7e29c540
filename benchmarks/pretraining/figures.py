"""PNG plots of the results."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker
from matplotlib.transforms import Bbox

from benchmarks.pretraining.corpora import title_of
from benchmarks.pretraining.methods import METHODS
from benchmarks.pretraining.step_times import Seconds
from benchmarks.pretraining.summary import Group, Row
from benchmarks.pretraining.tables import label
from benchmarks.pretraining.tuning import Rates, Tuned
from examples.common.figures import PAGE, in_style

Groups = Mapping[Group, Mapping[tuple[str, Rates], Row]]

# The methods that the comparison is about have colours, the others are grey: all have dashes.
COLOURS = {
    "natural-galore": ("tab:red", "-"),
    "natural-galore-lean": ("tab:red", (0, (2, 1))),
    "adamw": ("black", "--"),
    "adamw-clipped": ("black", ":"),
    "muon": ("tab:brown", "-."),
    "galore": ("tab:blue", ":"),
    "fira": ("tab:green", (0, (6, 1))),
    "apollo-mini": ("tab:orange", (0, (3, 1, 1, 1))),
    "natural-galore-paper": ("tab:purple", (0, (1, 3))),
    "natural-galore-published": ("tab:pink", (0, (3, 1, 1, 1, 1, 1))),
}
_GREY = "0.45"
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osv^D<>pX"
_CEILING = 1.2  # nats above the lowest loss that a panel still shows


def steps(groups: Groups, path: Path) -> None:
    """Mean validation loss over steps, a panel for each preset and corpus."""
    _curves(groups, path, "step")


def time(groups: Groups, path: Path, seconds: Seconds) -> None:
    """Mean validation loss over the time spent in training steps, of methods that were timed."""
    timed = {
        group: {
            key: _over_time(row, seconds[group[0]][row.method])
            for key, row in rows.items()
            if row.method in seconds[group[0]]
        }
        for group, rows in groups.items()
        if group[0] in seconds
    }
    _curves(timed, path, "seconds in training steps")


def _over_time(row: Row, of_step: float) -> Row:
    return row._replace(curve=tuple(p._replace(step=of_step * p.step) for p in row.curve))


@in_style
def size(groups: Groups, path: Path) -> None:
    """Final test loss over the bytes of the optimizer's state."""
    figure, panels = _panels(groups)
    panels = [(axes, [row for row in rows if not row.diverged]) for axes, rows in panels]
    for axes, rows in panels:
        for row in rows:
            at, colour = _at(row), _colour(row)
            axes.errorbar(*at, yerr=row.test_std or 0, fmt="o", color=colour, markersize=5)
        axes.set(xlabel="optimizer state, MiB", ylabel="test loss, nats per token")
        axes.margins(y=0.15)
        axes.set_xlim(0, 1.06 * axes.dataLim.x1)
    figure.draw_without_rendering()  # Names have no place before the panels have theirs.
    for axes, rows in panels:
        _name_points(axes, rows)
    figure.savefig(path)


def _at(row: Row) -> tuple[float, float]:
    return row.state_bytes / 2**20, row.test


def _colour(row: Row) -> str:
    return COLOURS.get(row.method, (_GREY, None))[0]


def _name_points(axes: Any, rows: Sequence[Row]) -> None:
    """Write each name at the first place beside its point that nothing else has."""
    points = axes.transData.transform([_at(row) for row in rows])
    taken = [Bbox.from_extents(*(xy - 5), *(xy + 5)) for xy in points]
    for row, own in zip(rows, list(taken), strict=True):
        name = label(row.method).removeprefix("Natural GaLore, ").removesuffix(" with AdamW")
        name = name.replace(", ", ",\n")
        text = axes.annotate(name, _at(row), (0, 0), textcoords="offset points", color=_colour(row))
        for y, x in itertools.product((4, -4, 14, -14), (4, -4)):
            horizontal, vertical = "left" if x > 0 else "right", "bottom" if y > 0 else "top"
            text.set(position=(x, y), ha=horizontal, va=vertical)
            box = text.get_window_extent()
            others = (other for other in taken if other is not own)
            is_inside = all(axes.bbox.contains(*corner) for corner in box.get_points())
            if is_inside and not any(map(box.overlaps, others)):
                break
        taken.append(box)


@in_style
def learning_rates(tuned: Mapping[str, Tuned], path: Path) -> None:
    """Final validation loss over each of the two rates, the other one at its best.

    A cross at the top is a divergence.
    """
    figure = matplotlib.figure.Figure(figsize=(PAGE, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = ("rate of hidden matrices", "ratio of all other rates to it")
    top = min(t.loss for t in tuned.values()) + _CEILING
    for axes, field, xlabel in zip(panels, ("hidden", "ratio"), names, strict=True):
        for number, (method, found) in enumerate(tuned.items()):
            fixed = found.rates._replace(**{field: 0.0})
            curve = {
                getattr(rates, field): loss
                for rates, loss in sorted(found.curve.items())
                if rates._replace(**{field: 0.0}) == fixed
            }
            style = _style(method, number)
            usable = {rate: loss for rate, loss in curve.items() if loss is not None}
            axes.plot(
                list(usable),
                list(usable.values()),
                marker=_MARKERS[number % len(_MARKERS)],
                **style,
            )
            lost = [rate for rate, loss in curve.items() if loss is None]
            if lost:  # Without points it has no place, and the layout fails.
                axes.plot(lost, [top] * len(lost), "x", color=style["color"], clip_on=False)
        axes.set(xlabel=xlabel, xscale="log", ylim=(None, top))
        axes.grid(which="both")
    panels[0].set(ylabel="final validation loss, nats per token")
    _legend(figure, panels[0])
    figure.savefig(path)


@in_style
def _curves(groups: Groups, path: Path, xlabel: str) -> None:
    figure, panels = _panels(groups)
    methods = dict.fromkeys(row.method for _, rows in panels for row in rows)
    methods = sorted(methods, key=lambda method: method in COLOURS)  # The grey ones count dashes.
    for axes, rows in panels:
        shown = [r for r in rows if not r.diverged]
        for row in shown:
            axes.plot(
                [point.step for point in row.curve],
                [point.loss for point in row.curve],
                **_style(row.method, methods.index(row.method)),
            )
        lowest = min((r.validation for r in shown), default=0.0)
        axes.set(ylim=(lowest - 0.05, lowest + _CEILING))
        axes.set(xlabel=xlabel, ylabel="validation loss, nats per token")
    _legend(figure, *(axes for axes, _ in panels))
    figure.savefig(path)


def _legend(figure: matplotlib.figure.Figure, *panels: Any) -> None:
    """One for all panels, below them."""
    lines = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        lines |= dict(zip(names, handles, strict=True))
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=3, handlelength=3.5
    )


def _panels(groups: Groups) -> tuple[matplotlib.figure.Figure, list[tuple[Any, Sequence[Row]]]]:
    # A Figure of its own, not pyplot: nothing global, no window system.
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = matplotlib.figure.Figure(figsize=(PAGE, 3.9 * lines), layout="constrained")
    all_axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for unused in all_axes[len(groups) :]:
        unused.remove()
    panels: list[tuple[Any, Sequence[Row]]] = []
    for axes, (group, rows) in zip(all_axes, groups.items(), strict=False):
        axes.set_title(f"{group[0]}, {title_of(group[1])}")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
        # Those that have a colour are drawn last, over the others.
        panels.append((axes, sorted(rows.values(), key=lambda row: row.method in COLOURS)))
    return figure, panels


def _style(method: str, number: int) -> dict[str, Any]:
    known = method in COLOURS
    colour, dashes = COLOURS.get(method, (_GREY, _DASHES[number % len(_DASHES)]))
    return {
        "color": colour,
        "linestyle": dashes,
        "linewidth": 1.8 if known else 1.0,
        "markersize": 4,
        "label": label(method) if method in METHODS or not known else method,
    }
