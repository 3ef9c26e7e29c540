"""Fine-tuning with one method, as a function from a configuration to a result."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import natgalore_jax as ng
from examples.common.checkpoints import Checkpoints
from examples.common.errors import ConfigError
from examples.common.metrics import Clock, MetricsLog, Record, of_kind
from examples.common.reporter import Reporter, Silent
from examples.common.schedule import warmup_linear
from examples.common.train_state import TrainState, init_state
from examples.finetune.encoder.data.batches import steps_per_epoch, train_batches
from examples.finetune.encoder.methods import Tuning, set_up
from examples.finetune.encoder.prepare import Prepared
from examples.finetune.encoder.run_config import RunConfig
from examples.finetune.encoder.scores import scores
from examples.finetune.encoder.train_step import (
    decisions,
    make_predict,
    make_step,
    predictions,
    row_losses,
)
from examples.finetune.encoder.weights import save_model


@dataclass(frozen=True)
class Result:
    """What a method came to."""

    method: str
    learning_rate: float
    tuning: Tuning
    state: TrainState
    records: list[Record]
    """Metrics of every logged step, and of every evaluation; see `metrics.of_kind`."""
    steps: int
    """Steps done: fewer than planned if the run was stopped or diverged."""
    finished: bool

    def summary(self) -> Record:
        """The numbers of a finished run."""
        memory = ng.memory_report(self.tuning.tx, self.tuning.trained)
        weights = jax.tree.leaves(self.state.weights)
        trained = jax.tree.leaves(self.state.params)
        train = of_kind(self.records, "train")
        # The last ones.
        evaluations = {r["kind"]: r for r in self.records if r["kind"] != "train"}
        return {
            "method": self.method,
            "learning_rate": self.learning_rate,
            "parameters": sum(x.size for x in weights),
            "trained_parameters": sum(x.size for x in trained),
            "optimizer_bytes": memory.total_state_bytes,
            "steps": self.steps,
            "seconds": train[-1]["seconds"],
            "train_loss": train[-1]["loss"],
            "losses": {kind: record["loss"] for kind, record in evaluations.items()},
            "metrics": {kind: record["metrics"] for kind, record in evaluations.items()},
        }


def train(
    config: RunConfig,
    method: str,
    prepared: Prepared,
    *,
    run_dir: Path | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Fine-tunes the model with one method.

    Args:
      config: The whole configuration.
      method: One of `methods.LEARNING_RATES`.
      prepared: What `prepare(config)` returned.
      run_dir: Where metrics, checkpoints and the model go. Without it nothing is written.
      reporter: Is told about progress. Without it nothing is printed.
      should_stop: Asked after each step and before each batch of an evaluation; once true, the run
        is saved and ends. A run that is resumed begins with the evaluation that was due.

    Raises:
      ConfigError: if `run_dir` holds a run that is not to be resumed, or one with another
        configuration or other rows; if the method does not fit the model; if the loss is not
        finite.
    """
    reporter = reporter if reporter is not None else Silent()
    if run_dir is None:
        return _Run(config, method, prepared, reporter, MetricsLog(), None).run(should_stop)
    run_dir.mkdir(parents=True, exist_ok=True)
    identity = config.identity() | {"method_name": method, "rows": prepared.fingerprint}
    with Checkpoints(run_dir / "checkpoints", keep=1) as checkpoints:
        done = checkpoints.resume_point(identity, run_dir, resume=config.output.resume)
        (run_dir / "config.json").write_text(json.dumps(identity, indent=2) + "\n")
        with MetricsLog(run_dir / "metrics.jsonl", resume_at=done) as log:
            run = _Run(config, method, prepared, reporter, log, (checkpoints, identity))
            result = run.run(should_stop)
    if result.finished:
        (run_dir / "summary.json").write_text(json.dumps(result.summary(), indent=2) + "\n")
        if config.output.save_model:
            weights = result.tuning.plain(result.state.weights)
            pretrained, labels = prepared.pretrained, prepared.rows.labels
            save_model(
                weights,
                pretrained.config,
                pretrained.raw_config,
                labels,
                prepared.tokenizer,
                run_dir / "model",
            )
    return result


class _Run:
    """The loop's variables, and the few things that are done with them in several places."""

    def __init__(
        self,
        config: RunConfig,
        method: str,
        prepared: Prepared,
        reporter: Reporter,
        log: MetricsLog,
        saving: tuple[Checkpoints, dict[str, Any]] | None,
    ):
        self.config, self.method, self.prepared = config, method, prepared
        self.reporter, self.log, self.saving = reporter, log, saving
        task, encoder = prepared.task, prepared.pretrained.config
        self.per_epoch = steps_per_epoch(prepared.encoded["train"], config.batch_size)
        self.steps = config.epochs * self.per_epoch
        self.peak = config.method.peak(method)
        schedule = warmup_linear(self.peak, config.warmup, self.steps)
        self.tuning = set_up(
            method, config.method, encoder, prepared.pretrained.params, schedule, config.seed
        )
        trained, frozen, tx = self.tuning.trained, self.tuning.frozen, self.tuning.tx
        self.state = jax.jit(lambda p, f: init_state(p, tx, f))(trained, frozen)
        self.step = make_step(self.tuning.apply, tx, regression=task.regression, seed=config.seed)
        self.predict = make_predict(self.tuning.apply)
        if saving is not None and saving[0].latest() is not None:
            self.state, _ = saving[0].restore(self.state)
        self._losses: list[jax.Array] = []
        self._clock = Clock(log.records[-1]["seconds"] if log.records else 0.0)

    def run(self, should_stop: Callable[[], bool]) -> Result:
        start = int(self.state.micro_step)
        batches = train_batches(
            self.prepared.encoded["train"], self.prepared.layout, self.config.seed, start
        )
        task = self.prepared.task
        self.reporter.start(start, self.steps, self.method)
        self._clock.start()
        try:
            step, ends_epoch = start, start > 0 and start % self.per_epoch == 0
            stop = ends_epoch and not self._evaluate(task.validation, step, should_stop)
            while step < self.steps and not stop:
                self.state, loss = self.step(self.state, next(batches))
                step += 1
                self._losses.append(loss)
                stop = should_stop()
                ends_epoch = step % self.per_epoch == 0
                if stop or ends_epoch or step % self.config.output.log_every == 0:
                    self._log_losses(step)
                if stop or ends_epoch:
                    # Saved before it is evaluated, which may take longer.
                    self._save()
                if ends_epoch and not stop:
                    stop = not self._evaluate(task.validation, step, should_stop)
            finished = (
                step == self.steps
                and not stop
                and (not task.test or self._evaluate(task.test, step, should_stop))
            )
        finally:
            self.reporter.stop()
        return Result(
            self.method, self.peak, self.tuning, self.state, self.log.records, step, finished
        )

    def _log_losses(self, step: int) -> None:
        """Records the mean loss since the last time; waits for the last step."""
        loss, count = float(np.mean(self._losses)), len(self._losses)
        self._losses = []
        self._clock.lap()
        if not math.isfinite(loss):
            raise ConfigError(
                f"{self.method}: the loss is not finite at step {step}: try a --learning-rate "
                f"below {self.peak:g}"
            )
        self._record("train", step, loss=loss, batches=count)

    def _evaluate(
        self, splits: tuple[str, ...], step: int, should_stop: Callable[[], bool]
    ) -> bool:
        """Records the scores of splits that have none of this step.

        Returns whether that is done; it is not if it was told to stop.
        """
        task = self.prepared.task
        for name in splits:
            if any(record["step"] == step for record in of_kind(self.log.records, name)):
                continue
            encoded, layout = self.prepared.encoded[name], self.prepared.layout
            outputs = predictions(self.predict, self.state.weights, encoded, layout, should_stop)
            if outputs is None:
                return False
            losses = row_losses(jnp.asarray(outputs), encoded.labels, task.regression)
            found = decisions(outputs, task.regression)
            metrics = scores(task.metrics, encoded.labels, found)
            self._record(name, step, metrics=metrics, loss=float(jnp.mean(losses)))
        self._clock.start()
        return True

    def _record(self, kind: str, step: int, **more: Any) -> None:
        epoch = round(step / self.per_epoch, 3)
        seconds = round(self._clock.seconds, 3)
        record = self.log.write(kind=kind, step=step, epoch=epoch, **more, seconds=seconds)
        self.reporter.record(record)

    def _save(self) -> None:
        if self.saving is not None:
            checkpoints, identity = self.saving
            checkpoints.save(self.state, {}, identity)
            self._clock.start()
