"""Methods tuned over a grid of rates each, then trained at the best one with more seeds."""

import abc
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from benchmarks.common import result_files
from benchmarks.common.environment import environment, print_targets
from benchmarks.common.result_files import Json, read_results
from benchmarks.common.sweep import sweep as sweep_runs
from examples.common.cli import exit_code, parse
from examples.common.errors import ConfigError

TUNE_SEED = 100

Grids = Mapping[str, Sequence[float]]
Losses = dict[str, dict[float, float | None]]  # By method and rate; None: diverged.


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite: runs that belong together."""

    root: Path
    """Directory of all suites."""
    suite: str = "main"
    """Directory of runs that belong together."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(Suite, abc.ABC):
    """Options of a run, beside those of its program."""

    method: str
    learning_rate: float
    seed: int = 1
    """Of everything random."""
    workers: int = 1
    """Runs at a time, for the record."""

    @property
    def path(self) -> Path:
        stage = "tune" if self.seed == TUNE_SEED else "seeds"
        name = f"{self.method}-lr{self.learning_rate:g}-seed{self.seed}.json"
        return self.root / self.suite / stage / name

    @abc.abstractmethod
    def configuration(self) -> Json:
        """The configuration that a file of the run must have been made with."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Suite):
    """Tune each method, then train it at its best rate with several seeds.

    A rate is the best by the validation loss. Start it again and it goes on. A run that fails does
    not stop the others; the exit code is then 1.
    """

    grids: ClassVar[Grids]  # Rates of the methods.

    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds after the tuning."""
    workers: int = 1
    """Runs at a time, each on one core where there is more than one."""
    plan: bool = False
    """Print what would be run by what is known now, and stop."""

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(self.grids):
            raise ConfigError(
                f"methods must be some of {', '.join(self.grids)}; got {', '.join(sorted(unknown))}"
            )
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")
        if TUNE_SEED in self.seeds:
            raise ConfigError(f"seeds must not contain {TUNE_SEED}, the seed of the tuning")


def is_done(run: RunOptions) -> bool:
    """Whether the run was made already.

    Raises:
      ConfigError: if it was made with another configuration.
    """
    return result_files.is_done(run.path, run.configuration())


def record_of(run: RunOptions) -> Json:
    """The first keys of a result."""
    return {
        "suite": run.suite,
        "method": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "environment": environment(run.seed),
        "workers": run.workers,
        "configuration": run.configuration(),
    }


def tuning_losses(records: Iterable[Json], loss: Callable[[Json], float]) -> Losses:
    """Validation losses of the tuning."""
    found: Losses = defaultdict(dict)
    for r in records:
        if r["seed"] == TUNE_SEED:
            found[r["method"]][r["learning_rate"]] = None if r.get("diverged") else loss(r)
    return found


def finished(records: Iterable[Json]) -> list[Json]:
    """The runs that did not diverge."""
    return [r for r in records if not r.get("diverged")]


def seeds_cell(group: Sequence[Json]) -> str:
    """The number of seeds for a table, which says if some diverged and are in no mean."""
    diverged = len(group) - len(finished(group))
    return f"{len(group)}, {diverged} diverged" if diverged else str(len(group))


def after_tuning(records: Iterable[Json]) -> list[Json]:
    """The runs with other seeds.

    Raises:
      ConfigError: if none of them has finished.
    """
    found = [r for r in records if r["seed"] != TUNE_SEED]
    if not finished(found):
        raise ConfigError("no finished run after the tuning yet: go on with the sweep command")
    return found


def by_rate(records: Iterable[Json], name: str) -> Mapping[tuple[str, float], list[Json]]:
    """:func:`after_tuning` by the field that names the method, and by rate."""
    groups: dict[tuple[str, float], list[Json]] = defaultdict(list)
    for r in after_tuning(records):
        groups[r[name], r["learning_rate"]].append(r)
    return groups


def best_rates(tuned: Losses) -> dict[str, float]:
    """The rate of the lowest validation loss, of each method that did not diverge at all rates."""
    found = {}
    for method, losses in tuned.items():
        usable = {loss: rate for rate, loss in losses.items() if loss is not None}
        if usable:
            found[method] = usable[min(usable)]
    return found


def maker(
    sweep: SweepOptions, common: type[Any], run: Callable[..., RunOptions]
) -> Callable[[str, float, int], RunOptions]:
    """The run of a method, a rate and a seed, with the fields of ``common`` as in the sweep."""
    shared = {field.name: getattr(sweep, field.name) for field in fields(common)}

    def make(method: str, rate: float, seed: int) -> RunOptions:
        given = {"method": method, "learning_rate": rate, "seed": seed}
        return run(**shared, **given, workers=sweep.workers)

    return make


def plan(
    sweep: SweepOptions, tuned: Losses, make: Callable[[str, float, int], RunOptions]
) -> list[RunOptions]:
    """The runs that are known by now: of the tuning, and of methods whose tuning is complete."""
    rates = {method: sweep.grids[method] for method in sweep.methods}
    tuning = [make(method, rate, TUNE_SEED) for method in rates for rate in rates[method]]
    complete = {m: tuned[m] for m in rates if m in tuned and tuned[m].keys() >= set(rates[m])}
    best = best_rates(complete)
    for method in (m for m in complete if m not in best):
        print(f"left out: {method}: the loss is not finite at any rate of the tuning")
    return tuning + [make(method, best[method], seed) for seed in sweep.seeds for method in best]


class Comparison(NamedTuple):
    """A program that compares methods."""

    program: str
    """Its module."""
    make: Callable[[Any], Json | None]
    """Make a run, unless that is done."""
    runs: Callable[[Any], Sequence[RunOptions]]
    """The runs of a sweep that are known by now."""
    outcome: Callable[[Json], str]
    """A result in a few words."""
    table: Callable[[list[Json]], str]
    """Results as Markdown."""
    targets: Callable[[list[Json]], list[Json]] = lambda records: []
    """Targets of the results."""

    def main(self, commands: Any, argv: Sequence[str] | None = None) -> int:
        """Run a command and return its exit code."""
        # A sweep that is told to end takes its runs along.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return exit_code(lambda: self.run(parse(commands, self.program, argv)))

    def run(self, command: Suite) -> int:
        """Do what a command says; a run that was stopped has the exit code 1."""
        match command:
            case RunOptions():
                self.make(command)
                return 0 if is_done(command) else 1
            case SweepOptions():
                return sweep_runs(
                    self.program,
                    lambda: self.runs(command),
                    is_done,
                    self.outcome,
                    workers=command.workers,
                    only_plan=command.plan,
                    searching=True,
                )
        records = read_results(command.root, command.suite)
        print(self.table(records))
        if targets := self.targets(records):
            print_targets(targets)
        return 0


def rate_cell(method: str, rate: float, grids: Grids) -> str:
    """A rate for a table, which says if it is at the end of its grid."""
    edge = rate in (min(grids[method]), max(grids[method]))
    return f"{rate:g}{', end of the grid' if edge else ''}"
