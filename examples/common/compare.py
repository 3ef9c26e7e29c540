"""Comparison of fine-tuning methods: configuration, loop, result, and one method after another.

A program sets up a method (`Setup`); saving, resuming, stopping and evaluating are done here.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import natgalore_jax as ng
from examples.common.checkpoints import Checkpoints, damage
from examples.common.cli import OPTIONS
from examples.common.config import INT32, check_range, plain, write_json
from examples.common.errors import CheckpointError, ConfigError
from examples.common.interrupt import GO_ON
from examples.common.loggers import LoggerName, make_loggers
from examples.common.methods import Tuning
from examples.common.metrics import Clock, MetricsLog, Record, of_kind
from examples.common.reporter import COMPILING, STARTING, TRAINING, Reporter, evaluating
from examples.common.run_directory import CHECKPOINTS, check_name
from examples.common.train_state import Metrics, Params, TrainState, are_finite, init_state

ShouldStop = Callable[[], bool]


class Diverged(ConfigError):
    """A loss that is not finite."""


@dataclass(frozen=True)
class OutputConfig:
    """Output: files and messages. All of this may change when a run is resumed."""

    name: str | None = None
    """Directory under the root; by default the data set or task, and the preset."""
    resume: bool = False
    """Continue each method from its last checkpoint."""
    overwrite: bool = False
    """Delete an earlier run of the same name, once this one has started."""
    root: Path = Path("runs")
    """Directory of all runs."""
    log_to: tuple[LoggerName, ...] = ()
    """Show the metrics in TensorBoard or Weights & Biases too."""
    quiet: bool = False
    """Print the summary only."""


def check(config: Any, positive: Sequence[str]) -> None:
    """Raise a ConfigError for what no comparison can run; `positive` are at least 1, or None."""
    check_range(config, f"[1, {INT32})", *positive)
    check_range(config, f"[0, {INT32})", "seed")
    if not config.methods:
        raise ConfigError("methods must name at least one method, got none")
    if len(set(config.methods)) < len(config.methods):
        raise ConfigError(f"methods must name each method once, got {' '.join(config.methods)}")
    if "lora" in config.methods and config.method.scale == 0:
        raise ConfigError("scale must be above 0 for lora, whose adapters 0 takes away; got 0")
    check_name(config.output.name)
    if config.output.resume and config.output.overwrite:
        raise ConfigError("a run is either resumed or overwritten: --resume, --overwrite")


def identity(config: Any, *harmless: str) -> dict[str, Any]:
    """All fields that influence the result of one of the methods, as JSON values."""
    values = plain(dataclasses.asdict(config))
    return {k: v for k, v in values.items() if k not in ("output", "methods", *harmless)}


@dataclass(frozen=True)
class Setup:
    """One method of a program, ready to be trained."""

    tuning: Tuning
    learning_rate: float
    """The peak."""
    parameters: int
    """Of the whole model."""
    epochs: int
    steps_per_epoch: int
    batches: Callable[[int], Iterator[Any]]
    """Inputs of the steps from a number on."""
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    describe: Callable[[list[Any]], Record]
    """More for the record of several batches."""
    evaluate: Callable[[str, Params, ShouldStop], Record | None]
    """Metrics and loss of a split with all weights; None if told to stop."""
    summarize: Callable[[list[Record]], Record]
    """More for the summary of a finished run."""
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)
    log_every: int = 1
    """Steps between two records."""
    best: Callable[[list[Record]], Record] | None = None
    """The best of the epochs, which `keep` saves."""
    keep: Callable[[Params], None] = lambda _: None
    """Save all weights of the best epoch so far."""
    donate: bool = False
    """Whether the initial weights may be overwritten."""


@dataclass(frozen=True)
class Result:
    """Result of a method."""

    tuning: Tuning
    state: TrainState
    records: list[Record]
    """Metrics of every logged step, and of every evaluation; see `metrics.of_kind`."""
    steps: int
    """Steps done: fewer than planned if the run was stopped."""
    finished: bool
    """Whether the last evaluation is done."""
    costs: Record
    """Method, peak learning rate and sizes."""
    more: Callable[[list[Record]], Record]

    def summary(self) -> Record:
        """The numbers of a finished run."""
        last = of_kind(self.records, "train")[-1]
        found = {"steps": self.steps, "seconds": last["seconds"], "train_loss": last["loss"]}
        return {**self.costs, **found, **self.more(self.records)}


def train(
    set_up: Callable[[], Setup],
    method: str,
    identity: dict[str, Any],
    reporter: Reporter,
    should_stop: ShouldStop,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    first: Record | None = None,
    started: Callable[[], None] = lambda: None,
    log_to: Sequence[LoggerName] = (),
    options: str,
) -> Result:
    """Fine-tune a model with one method.

    Args:
      set_up: called once it is known that the run may start.
      method: its name.
      identity: what must be equal for a run to go on.
      reporter: receives the progress.
      should_stop: asked before the first step, after each step and within evaluations; once true,
        the run is saved and ends. A resumed run begins with the evaluation that was due.
      run_dir: directory of metrics, checkpoints and summary; None writes nothing.
      resume: whether a run in `run_dir` may be continued.
      first: an evaluation before the first step.
      started: called before the first step, see `run_directory`.
      log_to: loggers that receive the metrics too.
      options: the whole configuration as a file for `--config`, written beside the metrics.

    Raises:
      ConfigError: if `run_dir` has a run that is not to be resumed, or one with another identity.
      CheckpointError: if the checkpoint is damaged, or the metrics of its steps are missing.
      Diverged: if the loss is not finite.
    """
    if run_dir is None:
        return _Run(set_up(), method, reporter, MetricsLog(), None).run(should_stop)
    run_dir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(run_dir / CHECKPOINTS, keep=1) as checkpoints:
        if resume and (latest := checkpoints.latest()) is not None:
            what = damage(run_dir / CHECKPOINTS / str(latest))
            if what is not None:
                raise CheckpointError(f"{what}: delete {run_dir} to train again")
        done = checkpoints.resume_point(identity, run_dir, resume=resume, note=reporter.note)
        write_json(run_dir / "config.json", identity)
        (run_dir / OPTIONS).write_text(options, encoding="utf-8")
        loggers = make_loggers(log_to, run_dir, identity)
        with MetricsLog(run_dir / "metrics.jsonl", loggers=loggers) as log:
            log.rewind(done)
            if done and not of_kind(log.records, "train"):
                raise CheckpointError(
                    f"{run_dir / 'metrics.jsonl'}: no metrics of the {done} steps that are done: "
                    f"delete {run_dir} to train again"
                )
            if first is not None and not log.records:
                log.write(**first)
            with reporter.during(STARTING):
                run = _Run(set_up(), method, reporter, log, (checkpoints, identity))
            started()
            result = run.run(should_stop)
    if result.finished:
        write_json(run_dir / "summary.json", result.summary())
    return result


class _Run:
    """Variables of the loop, and what is done with them in several places."""

    def __init__(
        self,
        setup: Setup,
        method: str,
        reporter: Reporter,
        log: MetricsLog,
        saving: tuple[Checkpoints, dict[str, Any]] | None,
    ):
        self.setup, self.method, self.reporter = setup, method, reporter
        self.log, self.saving = log, saving
        self.steps = setup.epochs * setup.steps_per_epoch
        tuning = setup.tuning
        self.costs = {
            "method": method,
            "learning_rate": setup.learning_rate,
            "parameters": setup.parameters,
            "trained_parameters": sum(x.size for x in jax.tree.leaves(tuning.trained)),
            "optimizer_bytes": ng.memory_report(tuning.tx, tuning.trained).total_state_bytes,
        }
        donated = (0, 1) if setup.donate else ()
        make = jax.jit(lambda p, f: init_state(p, tuning.tx, f), donate_argnums=donated)
        self.state = make(tuning.trained, tuning.frozen)
        if saving is not None and saving[0].latest() is not None:
            self.state, _ = saving[0].restore(self.state)
        self._since: list[tuple[Any, Metrics]] = []
        self._clock = Clock(log.records[-1]["seconds"] if log.records else 0.0)

    def run(self, should_stop: ShouldStop) -> Result:
        done = int(self.state.micro_step)
        batches = self.setup.batches(done)
        self.reporter.start(done, self.steps, self.method)
        self._clock.start()
        activity = COMPILING
        try:
            while True:
                ends_epoch = done > 0 and done % self.setup.steps_per_epoch == 0
                # An epoch is saved before it is evaluated, which may take longer.
                if ends_epoch and not self._evaluate(self.setup.validation, done, should_stop):
                    return self._result(done, False)
                if done == self.steps:
                    tested = self._evaluate(self.setup.test, done, should_stop)
                    return self._result(done, tested)
                if activity is COMPILING and should_stop():
                    self._save()
                    return self._result(done, False)
                batch = next(batches)
                with self.reporter.during(activity):
                    self.state, metrics = self.setup.step(self.state, batch)
                activity = TRAINING
                done += 1
                self._since.append((batch, metrics))
                ends_epoch = done % self.setup.steps_per_epoch == 0
                if ends_epoch or done % self.setup.log_every == 0:
                    self._log(done)
                stop = should_stop()
                if stop and self._since:
                    self._log(done)
                if stop or ends_epoch:
                    self._save()
                if stop:
                    return self._result(done, False)
        finally:
            self.reporter.stop()

    def _result(self, done: int, finished: bool) -> Result:
        setup, records = self.setup, self.log.records
        return Result(
            setup.tuning, self.state, records, done, finished, self.costs, setup.summarize
        )

    def _log(self, done: int) -> None:
        """Record means since the last record; waits for the last step."""
        batches = [batch for batch, _ in self._since]
        found = [metrics for _, metrics in self._since]
        means = {name: float(np.mean([m[name] for m in found])) for name in found[0]}
        self._since = []
        self._clock.lap()
        self._check("loss", math.isfinite(means["loss"]), done)
        self._record(self._as_record("train", done, means | self.setup.describe(batches)))

    def _evaluate(self, splits: tuple[str, ...], done: int, should_stop: ShouldStop) -> bool:
        """Record the scores of splits that have none of this step.

        Returns:
          Whether that is done; it is not if it was told to stop.
        """
        for name in splits:
            if any(record["step"] == done for record in of_kind(self.log.records, name)):
                continue
            with self.reporter.during(evaluating(name.replace("_", " "))):
                found = self.setup.evaluate(name, self.state.weights, should_stop)
            if found is None:
                return False
            self._check("loss", math.isfinite(found["loss"]), done)
            record, best = self._as_record(name, done, found), self.setup.best
            is_validation = name in self.setup.validation
            if is_validation and best is not None and best([*self.log.records, record]) is record:
                self.setup.keep(self.state.weights)
            self._record(record)
        self._clock.start()
        return True

    def _as_record(self, kind: str, step: int, found: Record) -> Record:
        epoch = round(step / self.setup.steps_per_epoch, 3)
        seconds = {"seconds": round(self._clock.seconds, 3)}
        return {"kind": kind, "step": step, "epoch": epoch, **found, **seconds}

    def _record(self, record: Record) -> None:
        self.reporter.record(self.log.write(**record))

    def _check(self, what: str, is_finite: bool, done: int) -> None:
        if not is_finite:
            raise Diverged(
                f"{self.method}: the {what} is not finite at step {done}: try a --learning-rate "
                f"below {self.setup.learning_rate:g}, or --clip-norm 1"
            )

    def _save(self) -> None:
        if self.saving is not None:
            checkpoints, identity = self.saving
            # By an update: the loss before it was finite.
            is_finite = are_finite(self.state.params)
            self._check("result of an update", is_finite, int(self.state.micro_step))
            checkpoints.save(self.state, {}, identity)
            self._clock.start()


def compare(
    methods: Sequence[str],
    train: Callable[[str], Result],
    console: Console,
    should_stop: ShouldStop,
) -> list[Result] | None:
    """Train with one method after another; None if the run was stopped before the end."""
    results = []
    for method in methods:
        result = train(method)
        if was_stopped(method, result, console, should_stop):
            return None
        results.append(result)
    return results


def was_stopped(name: str, result: Result, console: Console, should_stop: ShouldStop) -> bool:
    """Whether a training was told to stop, if only after its last step; says how to go on."""
    stopped = not result.finished or should_stop()
    if stopped:
        text = f"{name}: stopped at step {result.steps}, saved; {GO_ON}"
        console.print(text, soft_wrap=True)  # To be copied as one line.
    return stopped
