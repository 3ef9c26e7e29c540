"""The learning rate of each method: the best of the tuning suite."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.quality.files import Json

Curve = dict[float, float | None]  # loss of every complete rate; None where a run diverged


class Tuned(NamedTuple):
    """What tuning a method came to."""

    rate: float  # the best one
    loss: float  # its final validation loss, mean over corpora and seeds
    curve: Curve
    at_edge: bool  # whether a rate beyond the grid might be better still


def curves(records: Iterable[Json], preset: str) -> dict[str, Curve]:
    """Final validation loss of each method at each rate, averaged over the corpora and seeds.

    A rate at which any run diverged has None; a rate that lacks runs which the method's other rates
    have is not judged yet, and left out.
    """
    losses: dict[str, dict[float, dict[tuple[str, int], float | None]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for r in records:
        if r["preset"] == preset:
            loss = None if r["diverged"] else r["final_validation_loss"]
            losses[r["method"]][r["learning_rate"]][r["corpus"], r["seed"]] = loss
    return {name: _curve(by_rate) for name, by_rate in losses.items()}


def tuned_rates(records: Iterable[Json], preset: str) -> dict[str, Tuned]:
    """The best learning rate of each method at a preset: the one with the lowest loss.

    A method without any usable rate is left out. The best rate is at the edge if it is the lowest
    or the highest that was run. A higher one that diverged was run.
    """
    chosen = {name: _best(curve) for name, curve in curves(records, preset).items()}
    return {name: tuned for name, tuned in chosen.items() if tuned is not None}


def tuned_by_preset(records: Iterable[Json]) -> dict[str, dict[str, Tuned]]:
    """``tuned_rates`` of every preset that has any."""
    records = list(records)
    presets = dict.fromkeys(r["preset"] for r in records)
    tuned = {preset: tuned_rates(records, preset) for preset in presets}
    return {preset: found for preset, found in tuned.items() if found}


def _curve(by_rate: dict[float, dict[tuple[str, int], float | None]]) -> Curve:
    runs = set().union(*by_rate.values())
    return {rate: _mean([*x.values()]) for rate, x in sorted(by_rate.items()) if x.keys() == runs}


def _best(curve: Curve) -> Tuned | None:
    usable = {loss: rate for rate, loss in curve.items() if loss is not None}
    if not usable:
        return None
    loss = min(usable)
    rate = usable[loss]
    return Tuned(rate, loss, curve, at_edge=rate in (min(curve), max(curve)))


def _mean(losses: list[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if len(known) == len(losses) else None
