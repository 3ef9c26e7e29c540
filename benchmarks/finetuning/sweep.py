"""Many runs: which are planned, which are done, and the others a few at a time."""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from benchmarks.common.result_files import Json, read_suite
from benchmarks.common.sweep import sweep as sweep_runs
from benchmarks.finetuning.runs import Common, Run, is_done
from examples.common.errors import ConfigError
from examples.finetune.encoder.methods import MethodName

Pair = tuple[str, int]  # A method and its rank.
Curves = dict[Pair, dict[float, float]]  # Loss by learning rate.

GRID = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)


@dataclass(frozen=True, kw_only=True)
class Sweep(Common):
    """Make every run of a grid that is not done yet, each in a process of its own.

    Runs go seed by seed. Start it again and it goes on. A run that fails does not stop the others;
    the exit code is then 1.
    """

    methods: tuple[MethodName, ...] = ("adamw", "lora", "galore", "natural-galore")
    """The methods that train the model."""
    ranks: tuple[int, ...] = (4, 8)
    """Of all methods but adamw."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds."""
    tune: bool = False
    """Of the learning rates make every other one, then those beside the best, until it has both."""
    learning_rates: tuple[float, ...] = GRID
    """Peak learning rates of --tune; without it each method has its best one of the tuning."""
    refine: bool = False
    """Make the best one of --tune-suite, and the next lower one as long as it is better: for runs
    that are longer than those of that tuning."""
    tune_suite: str = "tune"
    """Suite of the tuned learning rates."""
    workers: int = 1
    """Runs at a time, each on one core where there is more than one."""
    plan: bool = False
    """Print what would be run, and stop."""


def runs(sweep: Sweep) -> list[Run]:
    """The runs of a sweep that are known by now, in the order in which they are made."""
    pairs = [
        (method, rank)
        for method in sweep.methods
        for rank in ((0,) if method == "adamw" else sweep.ranks)
    ]
    if sweep.tune or sweep.refine:
        rates = _tuning_rates(sweep, pairs)
    else:
        rates = {pair: (rate,) for pair, rate in _best_rates(sweep, pairs).items()}
    common = {field.name: getattr(sweep, field.name) for field in fields(Common)}
    return [
        Run(
            **common,
            method=method,
            rank=rank,
            learning_rate=rate,
            seed=seed,
            workers=sweep.workers,
        )
        for seed, (method, rank) in itertools.product(sweep.seeds, pairs)
        for rate in rates[method, rank]
    ]


def run_sweep(sweep: Sweep) -> int:
    """Make the runs and return the exit code."""
    return sweep_runs(
        "benchmarks.finetuning",
        lambda: runs(sweep),
        is_done,
        _outcome,
        workers=sweep.workers,
        only_plan=sweep.plan,
        searching=sweep.tune or sweep.refine,
    )


def curves(records: Iterable[Json]) -> Curves:
    """One minus the validation metric of each method and rank at each rate, mean over seeds."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for r in records:
        metric = r["metrics"][r["validation"]][r["metric"]]
        found[r["method"], r["rank"]][r["learning_rate"]].append(1 - metric)
    return {
        pair: {rate: statistics.fmean(values) for rate, values in by_rate.items()}
        for pair, by_rate in found.items()
    }


def next_rates(grid: Sequence[float], done: Mapping[float, float | None]) -> tuple[float, ...]:
    """Rates of the grid that a method needs next: every other one, then the neighbours of the best.

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


def _outcome(record: Json) -> str:
    return ", ".join(
        f"{split} {name} {100 * value:.1f}"
        for split, found in record["metrics"].items()
        for name, value in found.items()
    )


def _read_curves(sweep: Sweep, suite: str) -> Curves:
    return curves(r for r in read_suite(sweep.root, suite) if r["task"] == sweep.task)


def _tuning_rates(sweep: Sweep, pairs: list[Pair]) -> dict[Pair, tuple[float, ...]]:
    """Rates that are known by now to be of the search, those that are done included."""
    done = _read_curves(sweep, sweep.suite)
    if sweep.refine:
        first = _best_rates(sweep, pairs)
        wanted = {
            pair: _downwards(sweep.learning_rates, first[pair], done.get(pair, {}))
            for pair in pairs
        }
    else:
        wanted = {pair: next_rates(sweep.learning_rates, done.get(pair, {})) for pair in pairs}
    return {pair: tuple(sorted({*wanted[pair], *done.get(pair, {})})) for pair in pairs}


def _downwards(grid: tuple[float, ...], first: float, done: dict[float, float]) -> list[float]:
    """The first rate and lower ones of the grid, down to one that is not better than that above."""
    found = [first]
    for rate in sorted((rate for rate in grid if rate < first), reverse=True):
        found.append(rate)
        if rate not in done or done[rate] >= done.get(found[-2], -math.inf):
            break
    return found


def _best_rates(sweep: Sweep, pairs: list[Pair]) -> dict[Pair, float]:
    found = _read_curves(sweep, sweep.tune_suite)
    for method, rank in pairs:
        if (method, rank) not in found:
            raise ConfigError(
                f"{method} has no tuned learning rate at rank {rank}: no run of it in the suite "
                f"{sweep.tune_suite!r} of {sweep.root}; make them with sweep --tune"
            )
    return {pair: min(found[pair], key=found[pair].__getitem__) for pair in pairs}
