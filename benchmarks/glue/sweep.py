"""Many runs: which are planned, which are done, and the others a few at a time."""

import functools
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields

from benchmarks.glue.runs import Common, Json, Run, is_done
from benchmarks.quality.files import read, read_suite
from benchmarks.quality.search import next_rates
from benchmarks.quality.workers import command as command_of, run_all
from examples.glue.methods import MethodName
from examples.llama.train_config import ConfigError

# The command that makes one run.
command = functools.partial(command_of, program="benchmarks.glue")

GRID = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)


@dataclass(frozen=True, kw_only=True)
class Sweep(Common):
    """Make every run of a grid that is not done yet, each in a process of its own.

    Runs go seed by seed. Start it again and it goes on. A run that fails does not stop the others;
    the exit code is then 1.
    """

    methods: tuple[MethodName, ...] = ("adamw", "lora", "galore", "natural-galore")
    """What trains the model."""
    ranks: tuple[int, ...] = (4, 8)
    """Of all methods but adamw."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds."""
    tune: bool = False
    """Of the learning rates make every other one, then those beside the best, until it has both."""
    learning_rates: tuple[float, ...] = GRID
    """Peak learning rates of --tune; without it each method has its best one of the tuning."""
    tune_suite: str = "tune"
    """Where the tuned learning rates come from."""
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
    suite = sweep.suite if sweep.tune else sweep.tune_suite
    found = curves(r for r in read_suite(sweep.root, suite) if r["task"] == sweep.task)
    rates = {pair: _rates(sweep, found.get(pair, {}), pair) for pair in pairs}
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
    """Makes the runs and returns the exit code."""
    while True:
        planned = runs(sweep)
        todo = [run for run in planned if not is_done(run)]
        print(f"{len(planned)} runs, {len(planned) - len(todo)} done", flush=True)
        if sweep.plan:
            for run in todo:
                print(run.path)
            return 0
        if run_all(todo, sweep.workers, command, describe):
            return 1
        if not (sweep.tune and todo):
            return 0


def curves(records: Iterable[Json]) -> dict[tuple[str, int], dict[float, float]]:
    """One minus the validation metric of each method and rank at each rate, mean over seeds."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for r in records:
        metric = r["metrics"][r["validation"]][r["metric"]]
        found[r["method"], r["rank"]][r["learning_rate"]].append(1 - metric)
    return {
        pair: {rate: statistics.fmean(values) for rate, values in by_rate.items()}
        for pair, by_rate in found.items()
    }


def describe(run: Run, error: str | None) -> str:
    what = f"{run.path.parent.name} {run.path.stem}"
    if error is not None:
        return f"{what}: FAILED: {error}"
    record = read(run.path)
    metrics = ", ".join(
        f"{split} {name} {100 * value:.1f}"
        for split, found in record["metrics"].items()
        for name, value in found.items()
    )
    return f"{what}: {metrics}, {record['wall_seconds']:.0f} s"


def _rates(sweep: Sweep, done: dict[float, float], pair: tuple[str, int]) -> tuple[float, ...]:
    if sweep.tune:
        # Those that are done are of the plan too, so that they are counted.
        return tuple(sorted({*next_rates(sweep.learning_rates, done), *done}))
    if not done:
        raise ConfigError(
            f"{pair[0]} has no tuned learning rate at rank {pair[1]}: no run of it in the suite "
            f"{sweep.tune_suite!r} of {sweep.root}; make them with sweep --tune"
        )
    return (min(done, key=done.__getitem__),)
