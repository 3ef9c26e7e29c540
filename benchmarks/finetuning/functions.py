"""Function calling: AdamW, LoRA, GaLore and Natural GaLore, tuned by the same number of runs.

``python -m benchmarks.finetuning.functions sweep`` makes all runs and continues after a stop; each
run is `make functions` with another method, rate and seed; ``--preset nested`` takes NESTFUL.
"""

import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common.environment import RESULTS
from benchmarks.common.markdown import mean_and_spread, table
from benchmarks.common.result_files import Json, read_suite, write
from benchmarks.finetuning import grids
from examples.common.compare import Diverged
from examples.common.interrupt import stop_on_signals
from examples.common.reporter import Reporter
from examples.finetune.planner.evaluate import Evaluator
from examples.finetune.planner.loop import train
from examples.finetune.planner.methods import MethodName
from examples.finetune.planner.prepare import prepare
from examples.finetune.planner.run_config import PresetName, RunConfig, preset_config
from examples.finetune.planner.untrained import evaluate_untrained

# As many rates for each method. Low-rank updates have fewer dimensions and need higher rates.
GRIDS = {
    "adamw": (1e-5, 3e-5, 1e-4, 3e-4),
    "lora": (1e-4, 3e-4, 1e-3, 3e-3),
    "galore": (1e-4, 3e-4, 1e-3, 3e-3),
    "natural-galore": (1e-4, 3e-4, 1e-3, 3e-3),
}
_COLUMNS = (
    *("", "learning rate", "seeds", "state, MiB", "test loss"),
    *("success, %", "with arguments, %", "minutes"),
)


@dataclass(frozen=True, kw_only=True)
class Common(grids.Suite):
    """Options common to all runs of a suite."""

    preset: PresetName = "small"
    """Records, prompts and steps, as in examples.finetune.planner."""
    model: str = "smollm2-135m-instruct"
    """The model, as in examples.finetune.planner."""
    data: Path | None = None
    """Files of the data set, as in examples.finetune.planner."""
    limit: int | None = None
    """Train on so many records; by default as in the preset."""
    eval_limit: int | None = None
    """Validate and test on so many records; by default as in the preset."""
    root: Path = RESULTS / "function_calling"
    """Directory of all suites."""
    work: Path = Path(".cache/function_calling")
    """Directory of checkpoints of unfinished runs."""


@dataclass(frozen=True, kw_only=True)
class Run(Common, grids.RunOptions):
    """Make one run and write its file."""

    method: MethodName = "natural-galore"
    """Method that trains the model."""
    learning_rate: float = 3e-4
    """Peak learning rate."""

    @property
    def work_dir(self) -> Path:
        return self.work / self.suite / self.path.stem

    def config(self) -> RunConfig:
        """The configuration of the program."""
        config = preset_config(self.preset)
        return replace(
            config,
            model=self.model,
            data=self.data,
            limit=config.limit if self.limit is None else self.limit,
            eval_limit=config.eval_limit if self.eval_limit is None else self.eval_limit,
            seed=self.seed,
            method=replace(config.method, learning_rate=self.learning_rate),
            output=replace(config.output, resume=True),
        )

    def configuration(self) -> Json:
        """The configuration that a file of the run must have been made with."""
        return self.config().identity() | {"method_name": self.method}


@dataclass(frozen=True, kw_only=True)
class Sweep(Common, grids.SweepOptions):
    __doc__ = grids.SweepOptions.__doc__
    grids = GRIDS
    methods: tuple[MethodName, ...] = tuple(GRIDS)
    """Methods that train the model."""


@dataclass(frozen=True, kw_only=True)
class Show(grids.Suite):
    """Print a suite: mean ± standard deviation over the seeds, shares in percent."""

    root: Path = Common.root
    """Directory of all suites."""


def make(run: Run) -> Json | None:
    """Train and write the file; None if it was there already or the run was stopped."""
    start = time.perf_counter()
    if grids.is_done(run):
        return None
    config = run.config()
    prepared = prepare(config)
    evaluator = Evaluator(
        prepared,
        batch_size=config.batch_size,
        plans_at_once=config.eval_batch_size,
        new_tokens=config.new_tokens,
    )
    record = grids.record_of(run) | {
        "rows": {name: len(split.rows) for name, split in prepared.splits.items()},
    }
    reporter = Reporter()
    with stop_on_signals(lambda: reporter.activity.stops) as stop:
        where = run.work / run.suite / "untrained"
        untrained = evaluate_untrained(config, prepared, evaluator, where, reporter, stop)
        if untrained is None:
            return None
        given = (prepared, evaluator, untrained["validation"], run.work_dir, reporter, stop)
        try:
            result = train(config, run.method, *given)
        except Diverged:
            found = {"diverged": True}
        else:
            if not result.finished:
                return None
            found = {"diverged": False, "records": result.records, **result.summary()}
    seconds = {"wall_seconds": round(time.perf_counter() - start, 1)}
    record |= {"untrained": untrained["test"], **found, **seconds}
    write(record, run.path)
    shutil.rmtree(run.work_dir)
    return record


def runs(sweep: Sweep) -> list[grids.RunOptions]:
    """The runs that are known by now: of the tuning, and of methods whose tuning is complete."""
    tuned = grids.tuning_losses(
        read_suite(sweep.root, sweep.suite), lambda r: r["validation"]["loss"]
    )
    return grids.plan(sweep, tuned, grids.maker(sweep, Common, Run))


def results_table(records: list[Json]) -> str:
    """Markdown; one line for each method, after the model before training."""
    groups = grids.by_rate(records, "method")
    before = records[0]["untrained"]
    shares = (f"{100 * before['metrics'][name]:.1f}" for name in ("success", "aware_success"))
    rows: list[Sequence[str | None]] = [
        ["untrained", *[None] * 3, f"{before['loss']:.3f}", *shares]
    ]
    for (method, rate), group in groups.items():
        row = [method, grids.rate_cell(method, rate, GRIDS), grids.seeds_cell(group)]
        if done := grids.finished(group):
            row += [
                f"{done[0]['optimizer_bytes'] / 2**20:.2f}",
                mean_and_spread([r["test"]["loss"] for r in done], 3),
                *(
                    mean_and_spread([100 * r["test"]["metrics"][name] for r in done], 1)
                    for name in ("success", "aware_success")
                ),
                f"{statistics.median(r['seconds'] for r in done) / 60:.1f}",
            ]
        rows.append(row)
    return table(_COLUMNS, rows)


def _outcome(record: Json) -> str:
    if record["diverged"]:
        return "diverged"
    found = record["validation"]
    return f"validation loss {found['loss']:.3f}, success {100 * found['metrics']['success']:.1f}"


COMPARISON = grids.Comparison(
    "benchmarks.finetuning.functions", make, runs, _outcome, results_table
)

if __name__ == "__main__":
    sys.exit(COMPARISON.main(Run | Sweep | Show))
