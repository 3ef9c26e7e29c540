"""Fine-tuning with one method, as a function from a configuration to a result."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import natgalore_jax as ng
from examples.common.checkpoints import Checkpoints
from examples.common.errors import ConfigError
from examples.common.metrics import Clock, MetricsLog, Record, of_kind
from examples.common.reporter import Reporter
from examples.common.schedule import warmup_cosine
from examples.common.train_state import TrainState, init_state
from examples.finetune.planner.batches import learned_tokens, steps_per_epoch, train_steps
from examples.finetune.planner.best import best_epoch, read_best, save_best
from examples.finetune.planner.evaluate import EVALUATED, Evaluator
from examples.finetune.planner.methods import Tuning, set_up
from examples.finetune.planner.predictions import write_predictions
from examples.finetune.planner.prepare import Prepared
from examples.finetune.planner.run_config import RunConfig
from examples.finetune.planner.train_step import make_step
from examples.llama.model.config import parameter_count


@dataclass(frozen=True)
class Result:
    """What a method came to."""

    state: TrainState
    records: list[Record]
    """Metrics of every step, and of every evaluation; see `metrics.of_kind`."""
    finished: bool
    """Whether it was not stopped before the test."""
    costs: dict[str, Any]
    """Its sizes and its peak learning rate."""

    @property
    def steps(self) -> int:
        return int(self.state.micro_step)

    def summary(self) -> Record:
        """The numbers of a finished run."""
        train, best = of_kind(self.records, "train"), best_epoch(self.records)
        test = of_kind(self.records, "test")[-1]
        return {
            **self.costs,
            "steps": self.steps,
            "seconds": train[-1]["seconds"],
            "train_loss": train[-1]["loss"],
            "best_epoch": best["epoch"],
            "validation": {name: best[name] for name in EVALUATED},
            "test": {name: test[name] for name in EVALUATED},
        }


def train(
    config: RunConfig,
    method: str,
    prepared: Prepared,
    evaluator: Evaluator,
    untrained: dict[str, Any],
    run_dir: Path,
    reporter: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Fine-tunes the model with one method, and tests that of the best epoch.

    Args:
      config: the whole configuration.
      method: one of `methods.LEARNING_RATES`.
      prepared: what `prepare(config)` returned.
      evaluator: of `prepared`.
      untrained: the validation of the model before the first step, `Evaluation.summary()`.
      run_dir: where metrics, checkpoints, predictions and the model go.
      reporter: is told about progress.
      should_stop: asked after each step and between batches of an evaluation; once true, the run
        is saved and ends.

    Raises:
      ConfigError: if `run_dir` holds a run that is not to be resumed, or one with another
        configuration or other rows; if the method does not fit the model; if the loss is not
        finite.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    identity = config.identity() | {"method_name": method, "rows": prepared.fingerprint}
    with Checkpoints(run_dir / "checkpoints", keep=1) as checkpoints:
        done = checkpoints.resume_point(identity, run_dir, resume=config.output.resume)
        (run_dir / "config.json").write_text(json.dumps(identity, indent=2) + "\n")
        with MetricsLog(run_dir / "metrics.jsonl", resume_at=done) as log:
            if not log.records:
                log.write(kind="validation", step=0, epoch=0.0, **untrained, seconds=0.0)
            run = _Run(config, method, prepared, evaluator, run_dir, reporter, log)
            run.start_from(checkpoints, identity)
            finished = run.run(should_stop)
    result = Result(run.state, log.records, finished, run.costs)
    if finished:
        (run_dir / "summary.json").write_text(json.dumps(result.summary(), indent=2) + "\n")
    return result


class _Run:
    """The loop's variables, and the few things that are done with them in several places."""

    def __init__(
        self,
        config: RunConfig,
        method: str,
        prepared: Prepared,
        evaluator: Evaluator,
        run_dir: Path,
        reporter: Reporter,
        log: MetricsLog,
    ):
        self.config, self.method, self.prepared = config, method, prepared
        self.evaluator, self.run_dir = evaluator, run_dir
        self.reporter, self.log = reporter, log
        self.rows = prepared.splits["train"].rows
        self.per_epoch = steps_per_epoch(self.rows, config.rows_per_step)
        self.steps = config.epochs * self.per_epoch
        peak = config.method.peak(method)
        schedule = warmup_cosine(config.schedule, peak, self.steps)
        tuning = set_up(
            method, config.method, prepared.model, prepared.read(), schedule, config.seed
        )
        self.plain = tuning.plain
        self.costs = {
            "method": method,
            "learning_rate": peak,
            "parameters": parameter_count(prepared.model),
            "trained_parameters": sum(x.size for x in jax.tree.leaves(tuning.trained)),
            "optimizer_bytes": ng.memory_report(tuning.tx, tuning.trained).total_state_bytes,
        }
        self.state = _first_state(tuning)
        self.step = make_step(tuning.graphdef, tuning.tx)
        self._clock = Clock(log.records[-1]["seconds"])

    def start_from(self, checkpoints: Checkpoints, identity: dict[str, Any]) -> None:
        self.checkpoints, self.identity = checkpoints, identity
        if checkpoints.latest() is not None:
            self.state, _ = checkpoints.restore(self.state)

    def run(self, should_stop: Callable[[], bool]) -> bool:
        """Returns whether it came to the end."""
        done = int(self.state.micro_step)
        config = self.config
        steps = train_steps(
            self.rows,
            self.prepared.layout,
            config.batch_size,
            config.accumulate,
            config.seed,
            done,
        )
        self.reporter.start(done, self.steps, self.method)
        self._clock.start()
        try:
            while True:
                ends_epoch = done % self.per_epoch == 0
                # An epoch is saved before it is validated, which may take longer.
                if ends_epoch and not self._validate(done, should_stop):
                    return False
                if done == self.steps:
                    return self._test(done, should_stop)
                batches = next(steps)
                self.state, metrics = self.step(self.state, batches)
                done += 1
                self._log(done, metrics, learned_tokens(batches))
                stop = should_stop()
                if stop or done % self.per_epoch == 0:
                    self._save()
                if stop:
                    return False
        finally:
            self.reporter.stop()

    def _log(self, done: int, metrics: dict[str, jax.Array], tokens: int) -> None:
        """Records a step, which it waits for."""
        loss = float(metrics["loss"])
        self._clock.lap()
        if not math.isfinite(loss):
            raise self._diverged(done)
        self._record(
            "train",
            done,
            loss=loss,
            grad_norm=float(metrics["grad_norm"]),
            learned_tokens=tokens,
        )

    def _validate(self, done: int, should_stop: Callable[[], bool]) -> bool:
        """Evaluates an epoch and keeps its model if it is the best so far.

        Returns whether that is done; it is not if it was told to stop.
        """
        if any(record["step"] == done for record in of_kind(self.log.records, "validation")):
            return True
        params = self.plain(self.state.weights)
        found = self.evaluator(params, "validation", should_stop)
        if found is None:
            return False
        if not math.isfinite(found.loss):
            raise self._diverged(done)
        record = {"step": done, "kind": "validation", **found.summary()}
        if best_epoch([*self.log.records, record]) is record:
            save_best(params, self.prepared, self.run_dir)
        self._record("validation", done, **found.summary())
        self._clock.start()
        return True

    def _test(self, done: int, should_stop: Callable[[], bool]) -> bool:
        if of_kind(self.log.records, "test"):
            return True
        found = self.evaluator(read_best(self.prepared, self.run_dir), "test", should_stop)
        if found is None:
            return False
        write_predictions(
            found.predictions,
            self.run_dir,
            title=f"{self.config.dataset}, test split: {self.config.model} after {self.method}",
            shown=self.config.output.shown,
        )
        self._record("test", done, **found.summary())
        return True

    def _record(self, kind: str, step: int, **more: Any) -> None:
        epoch, seconds = round(step / self.per_epoch, 3), round(self._clock.seconds, 3)
        record = self.log.write(kind=kind, step=step, epoch=epoch, **more, seconds=seconds)
        self.reporter.record(record)

    def _save(self) -> None:
        self.checkpoints.save(self.state, {}, self.identity)
        self._clock.start()

    def _diverged(self, done: int) -> ConfigError:
        peak = self.costs["learning_rate"]
        return ConfigError(
            f"{self.method}: the loss is not finite at step {done}: try a --learning-rate below "
            f"{peak:g}, or --clip-norm 1"
        )


def _first_state(tuning: Tuning) -> TrainState:
    """In the place of the weights, which are given up."""
    make = jax.jit(lambda p, f: init_state(p, tuning.tx, f), donate_argnums=(0, 1))
    return make(tuning.trained, tuning.frozen)
