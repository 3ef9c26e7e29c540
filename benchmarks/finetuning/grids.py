"""Methods tuned over a grid of rates each, then trained at the best one with more seeds."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from benchmarks.common.result_files import Json
from benchmarks.common.sweep import Planned, sweep as sweep_runs
from examples.common.errors import ConfigError

TUNE_SEED = 100

Grids = Mapping[str, Sequence[float]]
Losses = dict[str, dict[float, float | None]]  # By method and rate; None: diverged.
R = TypeVar("R", bound=Planned)
S = TypeVar("S", bound="SweepOptions")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Options of a sweep, beside those of its runs and the methods."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds after the tuning."""
    workers: int = 1
    """Runs at a time, each on one core where there is more than one."""
    plan: bool = False
    """Print what would be run by what is known now, and stop."""


def check(grids: Grids, methods: Iterable[str], seeds: Iterable[int]) -> None:
    """Raise a ConfigError for methods without a grid, and for the seed of the tuning."""
    if unknown := set(methods) - set(grids):
        raise ConfigError(
            f"methods must be some of {', '.join(grids)}; got {', '.join(sorted(unknown))}"
        )
    if TUNE_SEED in seeds:
        raise ConfigError(f"seeds must not contain {TUNE_SEED}, the seed of the tuning")


def stage(seed: int) -> str:
    """Directory of a run's file in its suite."""
    return "tune" if seed == TUNE_SEED else "seeds"


def tuning_losses(records: Iterable[Json], loss: Callable[[Json], float]) -> Losses:
    """Validation losses of the tuning."""
    found: Losses = defaultdict(dict)
    for r in records:
        if r["seed"] == TUNE_SEED:
            found[r["method"]][r["learning_rate"]] = None if r["diverged"] else loss(r)
    return found


def best_rate(method: str, losses: Mapping[float, float | None]) -> float:
    """The rate of the lowest validation loss."""
    usable = {loss: rate for rate, loss in losses.items() if loss is not None}
    if not usable:
        raise ConfigError(f"{method}: the loss is not finite at any rate of the tuning")
    return usable[min(usable)]


def plan(
    grids: Grids,
    methods: Iterable[str],
    seeds: Iterable[int],
    tuned: Losses,
    make: Callable[[str, float, int], R],
) -> list[R]:
    """The runs that are known by now: of the tuning, and of methods whose tuning is complete.

    Args:
      grids: rates of the methods.
      methods: those that are compared.
      seeds: of the runs after the tuning.
      tuned: what the tuning has found.
      make: the run of a method, a rate and a seed.
    """
    methods = list(methods)
    tuning = [make(method, rate, TUNE_SEED) for method in methods for rate in grids[method]]
    best = {
        method: best_rate(method, tuned[method])
        for method in methods
        if tuned.get(method, {}).keys() >= set(grids[method])
    }
    return tuning + [make(method, best[method], seed) for seed in seeds for method in best]


def maker(
    sweep: SweepOptions, common: type[Any], run: Callable[..., R]
) -> Callable[[str, float, int], R]:
    """The run of a method, a rate and a seed, with the fields of ``common`` as in the sweep."""
    shared = {field.name: getattr(sweep, field.name) for field in fields(common)}

    def make(method: str, rate: float, seed: int) -> R:
        given = {"method": method, "learning_rate": rate, "seed": seed}
        return run(**shared, **given, workers=sweep.workers)

    return make


def sweep(
    program: str,
    options: S,
    runs: Callable[[S], Sequence[R]],
    is_done: Callable[[R], bool],
    outcome: Callable[[Json], str],
) -> int:
    """Make the runs, plan anew by their results until none is left, and return the exit code."""
    return sweep_runs(
        program,
        lambda: runs(options),
        is_done,
        outcome,
        workers=options.workers,
        only_plan=options.plan,
        searching=True,
    )


def rate_cell(method: str, rate: float, grids: Grids) -> str:
    """A rate for a table, which says if it is at the end of its grid."""
    edge = rate in (min(grids[method]), max(grids[method]))
    return f"{rate:g}{', end of the grid' if edge else ''}"
