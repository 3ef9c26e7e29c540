"""Learning rates found with few runs: one rate on a grid, or two by coordinate descent."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

STEP = 2.0  # between a point and those that bracket it
HALF_STEP = 2**0.5


class Rates(NamedTuple):
    """The rate of hidden matrices, and that of all other parameters over it."""

    hidden: float
    ratio: float

    def __str__(self) -> str:
        return f"{self.hidden:g} × {self.ratio:g}"


# Where every search of two rates begins.
START = Rates(0.005, 4.0)

Curve = Mapping[Rates, float | None]  # final loss, None where a run diverged


def next_rates(grid: Sequence[float], done: Mapping[float, float | None]) -> tuple[float, ...]:
    """Which rates of the grid a method needs next: every other one, then the best one's neighbours.

    Where the loss has one minimum over the grid, this ends at it. ``done`` has the loss of every
    rate that was run, None where it diverged. Nothing is next when the best rate and those beside
    it are known.
    """
    grid = sorted(set(grid))
    coarse = grid[1::2] or grid
    missing = tuple(rate for rate in coarse if rate not in done)
    if missing:
        return missing
    usable = {loss: rate for rate in grid if (loss := done.get(rate)) is not None}
    if not usable:  # All diverged: what is left may do better.
        return tuple(rate for rate in grid if rate not in done)
    best = grid.index(usable[min(usable)])
    return tuple(rate for rate in grid[max(best - 1, 0) : best + 2] if rate not in done)


def next_points(
    done: Curve, budget: int, start: Rates = START, fixed_ratio: float | None = None
) -> tuple[Rates, ...]:
    """The points that a search of both rates needs next; none when it is done.

    Coordinate descent: the best point so far is bracketed by twice and half its hidden rate, then
    by twice and half its ratio. Once it is, what is left of ``budget`` goes to the nearest points
    in half steps, two at a time, and each new best point is bracketed again. So the search ends
    inside what it has run, after at least ``budget`` runs.
    """
    if fixed_ratio is not None:
        start = Rates(start.hidden, fixed_ratio)
    point = best_point(done)
    if point is None:
        # Everything diverged: lower rates are the only way on.
        lowest = min((p.hidden for p in done), default=STEP * start.hidden)
        return (Rates(_rounded(lowest / STEP), start.ratio),)
    axes = ("hidden",) if fixed_ratio is not None else ("hidden", "ratio")
    for axis in axes:
        open_sides = [side for side in (-1, 1) if not _has_side(done, point, axis, side)]
        if open_sides:
            return tuple(_beside(point, axis, STEP**side) for side in open_sides)
    left = max(budget - len(done), 0)
    near = (p for p in _around(point, axes) if not _is_in(done, p))
    return tuple(itertools.islice(near, min(left, 2)))


def best_point(done: Curve) -> Rates | None:
    """The point with the least loss, None where all diverged."""
    usable = {rates: loss for rates, loss in done.items() if loss is not None}
    return min(usable, key=lambda rates: usable[rates]) if usable else None


def is_bracketed(done: Curve, fixed_ratio: bool = False) -> bool:
    """Whether lower and higher values of both rates were run beside the best point."""
    point = best_point(done)
    axes = ("hidden",) if fixed_ratio else ("hidden", "ratio")
    return point is not None and all(
        _has_side(done, point, axis, side) for axis in axes for side in (-1, 1)
    )


def _has_side(done: Curve, point: Rates, axis: str, side: int) -> bool:
    return any(side * other > side * getattr(point, axis) for other in _line(done, point, axis))


def _line(done: Curve, point: Rates, axis: str) -> Iterator[float]:
    """Values of ``axis`` in the points that are as ``point`` otherwise."""
    for other in done:
        if point._replace(**{axis: 0.0}) == other._replace(**{axis: 0.0}):
            yield getattr(other, axis)


def _around(point: Rates, axes: Sequence[str]) -> Iterator[Rates]:
    """Points in half steps around ``point``, the nearest first, of those along the rate first."""
    for distance in itertools.count(1):
        for along in range(distance, -1 if "ratio" in axes else distance - 1, -1):
            across = distance - along
            for i, j in itertools.product(sorted({-along, along}), sorted({-across, across})):
                yield _beside(_beside(point, "hidden", HALF_STEP**i), "ratio", HALF_STEP**j)


def _is_in(done: Curve, point: Rates) -> bool:
    """Whether ``point`` was run, or one that differs from it by rounding alone."""
    return any(
        math.isclose(a, b, rel_tol=0.01) and math.isclose(c, d, rel_tol=0.01)
        for (a, c), (b, d) in ((other, point) for other in done)
    )


def _beside(point: Rates, axis: str, factor: float) -> Rates:
    return point._replace(**{axis: _rounded(getattr(point, axis) * factor)})


def _rounded(value: float) -> float:
    """Three digits, as in the names of files."""
    return float(f"{value:.3g}")
