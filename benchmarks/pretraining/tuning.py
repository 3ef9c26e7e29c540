"""The rates of each method: the best of the tuning suite."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.common.result_files import Json
from benchmarks.pretraining.methods import choose
from benchmarks.pretraining.search import Curve, Rates, best_point, is_bracketed


class Tuned(NamedTuple):
    """Result of tuning a method."""

    rates: Rates  # the best ones
    loss: float  # final validation loss at them, mean over corpora and seeds
    curve: Curve  # loss at every complete point; None where a run diverged
    at_edge: bool  # whether rates beyond those that were run might be better still


def rates_of(record: Json) -> Rates:
    """Both rates of a run."""
    return Rates(record["learning_rate"], record["ratio"])


def curves(records: Iterable[Json], preset: str) -> dict[str, Curve]:
    """Final validation loss of each method at each point, averaged over the corpora and seeds.

    A point at which any run diverged has None; a point that lacks runs which the method's other
    points have is not judged yet, and left out.
    """
    losses: dict[str, dict[Rates, dict[tuple[str, int], float | None]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for r in records:
        if r["preset"] == preset:
            loss = None if r["diverged"] else r["final_validation_loss"]
            losses[r["method"]][rates_of(r)][r["corpus"], r["seed"]] = loss
    return {name: _curve(by_rates) for name, by_rates in losses.items()}


def tuned_rates(records: Iterable[Json], preset: str) -> dict[str, Tuned]:
    """The best rates of each method at a preset: those with the lowest loss.

    A method without any usable point is left out. The best point is at the edge unless lower and
    higher values of each rate were run beside it; values that diverged were run.
    """
    chosen = {name: _best(name, curve) for name, curve in curves(records, preset).items()}
    return {name: tuned for name, tuned in chosen.items() if tuned is not None}


def tuned_by_preset(records: Iterable[Json]) -> dict[str, dict[str, Tuned]]:
    """``tuned_rates`` of every preset that has any."""
    records = list(records)
    presets = dict.fromkeys(r["preset"] for r in records)
    tuned = {preset: tuned_rates(records, preset) for preset in presets}
    return {preset: found for preset, found in tuned.items() if found}


def _curve(by_rates: dict[Rates, dict[tuple[str, int], float | None]]) -> Curve:
    runs = set().union(*by_rates.values())
    return {r: _mean([*x.values()]) for r, x in sorted(by_rates.items()) if x.keys() == runs}


def _best(method: str, curve: Curve) -> Tuned | None:
    rates = best_point(curve)
    if rates is None:
        return None
    loss = curve[rates]
    assert loss is not None, "best_point returns usable points alone"
    fixed_ratio = choose(method).method.ratio is not None
    return Tuned(rates, loss, curve, at_edge=not is_bracketed(curve, fixed_ratio))


def _mean(losses: list[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if len(known) == len(losses) else None
