"""Encoders: AdamW, LoRA, GaLore and Natural GaLore, tuned by the same number of runs.

``python -m benchmarks.finetuning.encoder sweep`` makes all runs and continues after a stop; each
run is `make finetune` with one method, another rank, rate and seed.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from benchmarks.common.environment import RESULTS, target
from benchmarks.common.markdown import mean_and_spread, table
from benchmarks.common.result_files import Json, read_suite, write
from benchmarks.finetuning import grids
from examples.common.compare import Diverged
from examples.common.errors import ConfigError
from examples.finetune.encoder import methods
from examples.finetune.encoder.baseline import baseline_scores
from examples.finetune.encoder.loop import train
from examples.finetune.encoder.prepare import prepare
from examples.finetune.encoder.run_config import RunConfig, TaskName, preset_config

# Natural GaLore may be so many points below AdamW.
MARGIN = 0.2
# What tf-idf and logistic regression reach on another split of the movie snippets.
BASELINE = 80.8


class Method(NamedTuple):
    """A method at a rank, with the rates of its tuning."""

    name: methods.MethodName
    rank: int | None
    rates: tuple[float, ...]


# As many rates for each method.
METHODS = {
    "adamw": Method("adamw", None, (1e-5, 2e-5, 5e-5, 1e-4)),
    "natural-galore-r8": Method("natural-galore", 8, (1e-4, 2e-4, 5e-4, 1e-3)),
    "lora-r8": Method("lora", 8, (5e-4, 1e-3, 2e-3, 5e-3)),
    "natural-galore-r4": Method("natural-galore", 4, (5e-5, 1e-4, 2e-4, 5e-4)),
    "lora-r4": Method("lora", 4, (5e-4, 1e-3, 2e-3, 5e-3)),
    "galore-r8": Method("galore", 8, (1e-4, 2e-4, 5e-4, 1e-3)),
    "galore-r4": Method("galore", 4, (1e-4, 2e-4, 5e-4, 1e-3)),
}
GRIDS = {name: method.rates for name, method in METHODS.items()}

if TYPE_CHECKING:
    MethodName = str
else:  # The names that the command line offers.
    MethodName = Literal[tuple(METHODS)]


@dataclass(frozen=True, kw_only=True)
class Common(grids.Suite):
    """Options common to all runs of a suite."""

    task: TaskName = "movie-snippets"
    """The task; those of GLUE need --data or a hub."""
    data: Path | None = None
    """Its files, as in examples.finetune.encoder."""
    model: str = "minilm"
    """The model, as in examples.finetune.encoder."""
    epochs: int | None = None
    """Passes over the rows; by default as in examples.finetune.encoder."""
    limit: int | None = None
    """Train on so many rows only."""
    root: Path = RESULTS / "glue"
    """Directory of all suites."""


@dataclass(frozen=True, kw_only=True)
class Run(Common, grids.RunOptions):
    """Make one run and write its file."""

    method: MethodName = "natural-galore-r8"
    """Method that trains the model, and its rank."""
    learning_rate: float = 2e-4
    """Peak learning rate."""

    def config(self) -> RunConfig:
        """The configuration of the program."""
        config, own = preset_config("default", self.task), METHODS[self.method]
        method = replace(config.method, learning_rate=self.learning_rate)
        return replace(
            config,
            data=self.data,
            model=self.model,
            methods=(own.name,),
            epochs=config.epochs if self.epochs is None else self.epochs,
            limit=self.limit,
            seed=self.seed,
            method=method if own.rank is None else replace(method, rank=own.rank),
        )

    def configuration(self) -> Json:
        """The configuration that a file of the run must have been made with."""
        return self.config().identity()


@dataclass(frozen=True, kw_only=True)
class Sweep(Common, grids.SweepOptions):
    __doc__ = grids.SweepOptions.__doc__
    grids = GRIDS
    methods: tuple[MethodName, ...] = tuple(METHODS)
    """Methods that train the model."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Seeds after the tuning."""


@dataclass(frozen=True, kw_only=True)
class Show(grids.Suite):
    """Print a suite: mean ± standard deviation over the seeds, metrics in percent."""

    root: Path = Common.root
    """Directory of all suites."""


def make(run: Run) -> Json | None:
    """Train and write the file; None if it was there already."""
    start = time.perf_counter()
    if grids.is_done(run):
        return None
    config, own = run.config(), METHODS[run.method]
    prepared = prepare(config)
    record = grids.record_of(run) | {
        "task": run.task,
        "label": own.name if own.rank is None else f"{own.name}, rank {own.rank}",
        "rows": {name: len(part.tokens) for name, part in prepared.encoded.items()},
        "metric": prepared.task.metrics[0],
        "validation": prepared.task.validation[0],
        "baseline": baseline_scores(prepared.task, prepared.rows),
    }
    try:
        result = train(config, own.name, prepared)
    except Diverged:
        found = {"diverged": True}
    else:
        found = {"diverged": False, "records": result.records, **result.summary()}
    seconds = round(time.perf_counter() - start, 1)
    # The summary has the program's name of the method, without the rank.
    record |= found | {"method": run.method, "wall_seconds": seconds}
    write(record, run.path)
    return record


def runs(sweep: Sweep) -> list[grids.RunOptions]:
    """The runs that are known by now: of the tuning, and of methods whose tuning is complete."""
    tuned = grids.tuning_losses(
        read_suite(sweep.root, sweep.suite), lambda r: r["losses"][r["validation"]]
    )
    return grids.plan(sweep, tuned, grids.maker(sweep, Common, Run))


def results_table(records: list[Json]) -> str:
    """Markdown; one line for each method and rank."""
    groups = grids.by_rate(records, "label")
    of_any = grids.finished(records)[0]
    columns = [(split, name) for split, found in of_any["metrics"].items() for name in found]
    last = columns[-1][0]
    rows: list[Sequence[str | None]] = []
    for (label, rate), group in groups.items():
        row = [label, grids.rate_cell(group[0]["method"], rate, GRIDS), grids.seeds_cell(group)]
        if done := grids.finished(group):
            row += [
                f"{done[0]['trained_parameters']:,}",
                f"{done[0]['optimizer_bytes'] / 2**20:.2f}",
                *(
                    mean_and_spread([100 * r["metrics"][split][name] for r in done], 1)
                    for split, name in columns
                ),
                # Older results have no losses.
                mean_and_spread([r["losses"][last] for r in done], 3)
                if all("losses" in r for r in done)
                else None,
                f"{statistics.median(r['seconds'] for r in done) / 60:.1f}",
            ]
        rows.append(row)
    if of_any["baseline"] is not None:
        found = (f"{100 * of_any['baseline'][split][name]:.1f}" for split, name in columns)
        rows.append(["tf-idf, logistic", *[None] * 4, *found])
    titles = [*(f"{split} {name}" for split, name in columns), f"{last} loss"]
    header = ["", "learning rate", "seeds", "trained", "state, MiB", *titles, "minutes"]
    return table(header, rows)


def targets(records: list[Json]) -> list[Json]:
    """Targets of Natural GaLore, for each rank that all methods were run at.

    Means of the main metric of the last split, which is the test split where there is one. A seed
    that diverged counts as none right.

    Raises:
      ConfigError: if a method has seeds at several rates.
    """
    groups: dict[str, list[Json]] = {}
    for (label, rate), group in grids.by_rate(records, "label").items():
        if label in groups:
            raise ConfigError(
                f"{label}: seeds at several learning rates, {groups[label][0]['learning_rate']:g} "
                f"and {rate:g}: delete those of one"
            )
        if grids.finished(group):
            groups[label] = group
    found = []
    for rank in (4, 8):
        ours, lora = (groups.get(f"{name}, rank {rank}") for name in ("natural-galore", "lora"))
        adamw = groups.get("adamw")
        if ours is None or lora is None or adamw is None:
            continue
        name, score = f"natural-galore, rank {rank}", _main(ours)
        state = _state(ours) / _state(lora)
        found += [
            target(f"{name}: points above adamw", score - _main(adamw), -MARGIN, at_most=False),
            target(f"{name}: points above lora", score - _main(lora), 0.0, at_most=False),
            target(f"{name}: state over lora's", state, 1.0),
        ]
        if grids.finished(ours)[0]["task"] == "movie-snippets":
            found.append(target(f"{name}: percent", score, BASELINE, at_most=False))
    return found


def _state(group: list[Json]) -> int:
    return grids.finished(group)[0]["optimizer_bytes"]


def _main(group: list[Json]) -> float:
    done = grids.finished(group)
    split = list(done[0]["metrics"])[-1]
    return 100 * sum(r["metrics"][split][r["metric"]] for r in done) / len(group)


def _outcome(record: Json) -> str:
    if record["diverged"]:
        return "diverged"
    found = [f"validation loss {record['losses'][record['validation']]:.4f}"]
    for split, metrics in record["metrics"].items():
        found += [f"{split} {name} {100 * value:.1f}" for name, value in metrics.items()]
    return ", ".join(found)


COMPARISON = grids.Comparison(
    "benchmarks.finetuning.encoder", make, runs, _outcome, results_table, targets
)

if __name__ == "__main__":
    sys.exit(COMPARISON.main(Run | Sweep | Show))
