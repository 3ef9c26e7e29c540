"""The rates of each method: found by coordinate descent, in the tuning suite.

The search has one seed. The best of its points may be run with others, which decide among them.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.common.result_files import Json
from benchmarks.pretraining.methods import own_ratio

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
# The best points of a search that are run with the other seeds of tuning.
FINALISTS = 3

Curve = Mapping[Rates, float | None]  # final loss, None where a run diverged


def next_points(
    done: Curve, budget: int, fixed_ratio: float | None = None, best: Rates | None = None
) -> tuple[Rates, ...]:
    """The points that a search of both rates needs next; none when it is done.

    Coordinate descent: the best point so far is bracketed by twice and half its hidden rate, then
    by twice and half its ratio. Once it is, what is left of ``budget`` goes to the nearest points
    in half steps, two at a time, and each new best point is bracketed again. So the search ends
    inside what it has run, after at least ``budget`` runs.

    Args:
      done: what was run with the seed of the search.
      budget: runs at least.
      fixed_ratio: the ratio of a method with one rate.
      best: the best point if other seeds have decided.
    """
    start = START if fixed_ratio is None else Rates(START.hidden, fixed_ratio)
    point = best or best_point(done)
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
    return next(iter(best_points(done)), None)


def best_points(done: Curve) -> list[Rates]:
    """All points that did not diverge, the best first."""
    usable = {rates: loss for rates, loss in done.items() if loss is not None}
    return sorted(usable, key=lambda rates: usable[rates])


def is_bracketed(done: Curve, point: Rates, fixed_ratio: bool = False) -> bool:
    """Whether lower and higher values of both rates were run beside a point."""
    axes = ("hidden",) if fixed_ratio else ("hidden", "ratio")
    return all(_has_side(done, point, axis, side) for axis in axes for side in (-1, 1))


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


class Tuned(NamedTuple):
    """Result of tuning a method."""

    rates: Rates  # the best ones
    loss: float  # final validation loss at them, mean over corpora and seeds
    seeds: int  # with which they were run
    curve: Curve  # loss at every complete point of the search; None where a run diverged
    at_edge: bool  # whether rates beyond those that were run might be better still


def rates_of(record: Json) -> Rates:
    """Both rates of a run."""
    return Rates(record["learning_rate"], record["ratio"])


_Runs = dict[tuple[str, int], float | None]  # loss by corpus and seed


def curves(records: Iterable[Json], preset: str) -> dict[str, Curve]:
    """Final validation loss of each method at each point of its search, averaged over the corpora.

    A search has one seed, the lowest. A point at which any run diverged has None; a point that
    lacks runs which the method's other points have is not judged yet, and left out.
    """
    return {name: _curve(_search(points)) for name, points in _losses(records, preset).items()}


def tuned_rates(records: Iterable[Json], preset: str) -> dict[str, Tuned]:
    """The best rates of each method at a preset: those with the lowest loss.

    Where some points were run with more seeds than the search, these points are judged alone. A
    method without any usable point is left out. The best point is at the edge unless lower and
    higher values of each rate were run beside it; values that diverged were run.
    """
    chosen = {name: _best(name, points) for name, points in _losses(records, preset).items()}
    return {name: tuned for name, tuned in chosen.items() if tuned is not None}


def tuned_by_preset(records: Iterable[Json]) -> dict[str, dict[str, Tuned]]:
    """``tuned_rates`` of every preset that has any."""
    records = list(records)
    presets = dict.fromkeys(r["preset"] for r in records)
    tuned = {preset: tuned_rates(records, preset) for preset in presets}
    return {preset: found for preset, found in tuned.items() if found}


def _losses(records: Iterable[Json], preset: str) -> dict[str, dict[Rates, _Runs]]:
    """Final validation losses of each method at each point."""
    losses: dict[str, dict[Rates, _Runs]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        if r["preset"] == preset:
            loss = None if r["diverged"] else r["final_validation_loss"]
            losses[r["method"]][rates_of(r)][r["corpus"], r["seed"]] = loss
    return losses


def _search(points: Mapping[Rates, _Runs]) -> dict[Rates, _Runs]:
    """The runs with the seed of the search."""
    first = min(seed for runs in points.values() for _, seed in runs)
    return {
        rates: {run: loss for run, loss in runs.items() if run[1] == first}
        for rates, runs in points.items()
    }


def _curve(points: Mapping[Rates, _Runs]) -> Curve:
    """The mean loss at every point that has all runs."""
    all_runs = set().union(*points.values())
    return {r: _mean([*x.values()]) for r, x in sorted(points.items()) if x.keys() == all_runs}


def _best(method: str, points: Mapping[Rates, _Runs]) -> Tuned | None:
    final, curve = _curve(points), _curve(_search(points))
    rates = best_point(final)
    if rates is None:
        return None
    loss = final[rates]
    assert loss is not None, "best_point returns usable points alone"
    seeds = len({seed for _, seed in points[rates]})
    is_inside = is_bracketed(curve, rates, own_ratio(method) is not None)
    return Tuned(rates, loss, seeds, curve, at_edge=not is_inside)


def _mean(losses: list[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if len(known) == len(losses) else None
