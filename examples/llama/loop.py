"""The training loop, as a function from a configuration to a result."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.common.checkpoints import Checkpoints
from examples.common.cli import OPTIONS, options_text
from examples.common.config import write_json
from examples.common.errors import ConfigError
from examples.common.loggers import make_loggers
from examples.common.lora import partition
from examples.common.metrics import Clock, MetricsLog, of_kind
from examples.common.reporter import COMPILING, STARTING, Reporter, evaluating
from examples.common.run_directory import CHECKPOINTS, run_directory
from examples.common.train_state import Metrics, are_finite
from examples.llama.data import Splits, eval_batches, load_splits
from examples.llama.data.tokenizer import save_text_tokenizer
from examples.llama.distributed.batches import TrainBatches, documents_end
from examples.llama.distributed.devices import Devices, make_devices
from examples.llama.memory.peak import RunMemory, describe, observed_peak
from examples.llama.memory.step_memory import StepMemory, check_batch, of_compiled
from examples.llama.model.adapters import make_linear
from examples.llama.result import Result as Result
from examples.llama.resume import check_resume, prepare, recounted
from examples.llama.run_config import RunConfig
from examples.llama.training.build import first_state, make_step, on_the_host, placed_state
from examples.llama.training.evaluate import make_eval_step, mean_nll, perplexity
from examples.llama.training.faults import Guard
from examples.llama.training.optimization import make_optimization
from examples.llama.training.relora import make_merge
from examples.llama.training.train_step import make_model
from examples.llama.training.utilization import speed
from examples.llama.weights.initial import overlay


def train(
    config: RunConfig,
    *,
    splits: Splits | None = None,
    tx: optax.GradientTransformation | None = None,
    run_dir: Path | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    initial: Callable[[], Any] | None = None,
) -> Result:
    """Trains a model as `config` says.

    Args:
      config: The whole configuration.
      splits: The text as tokens; by default what `config.data` names.
      tx: An optimizer to use instead of `config.optimizer`. It sees one gradient for each
        micro-batch, of the trained parameters only, or with `config.accumulate_in_subspace` one
        low-rank gradient for each step; its learning rate is its own and is not recorded.
        ReLoRA's restarts multiply its updates.
      run_dir: Where metrics and checkpoints go. Without it nothing is written.
      reporter: Receives the progress. Without it nothing is printed.
      should_stop: Asked before the step is compiled, after each micro-batch and before each batch
        of an evaluation; once true, the run is saved and ends. A run that is resumed begins with
        the evaluation that was due.
      initial: Gives the weights to start from, of a model without adapters, instead of random
        ones. Not called by a run that is resumed.

    Returns:
      The state after the last step and the records of all steps, those before a resume included.

    Several processes each call it with the same arguments, after `distributed.start`. The first of
    them writes and reports.

    Raises:
      ConfigError: if `run_dir` holds a run that is not to be resumed, or one with more steps or a
        configuration that differs in more than `run_config.differences` allows, or nothing but
        damaged checkpoints; if a batch is larger than the memory; if the optimizer does not fit the
        model, ReLoRA or the accumulation; if the loss jumps after too many rollbacks.
      CheckpointError: if a checkpoint cannot be written.
    """
    splits = splits if splits is not None else load_splits(config.data)
    options = options_text(config, "examples.llama")
    config = config.with_vocabulary(splits.vocab_size)
    check_batch(config)
    devices = make_devices(config.distributed, config.batch_size)
    reporter = reporter if reporter is not None and devices.leads else Reporter()
    if run_dir is None:
        return _Run(config, splits, tx, reporter, MetricsLog(), None, devices, initial).run(
            should_stop
        )

    output, identity = config.output, _identity(config, splits)
    held: Any = contextlib.nullcontext(lambda: None)
    if devices.leads:
        held = run_directory(run_dir, output.overwrite, has_parts=False)
    with held as started:
        if devices.leads and output.resume:
            prepare(run_dir, config, identity, reporter)
        devices.wait("run directory")
        with Checkpoints(
            run_dir / CHECKPOINTS, keep=output.keep, keep_best=output.keep_best
        ) as checkpoints:
            check_resume(checkpoints, run_dir, config, identity, reporter)
            log = MetricsLog()
            if devices.leads:
                write_json(run_dir / "config.json", config.to_dict())
                save_text_tokenizer(splits.tokenizer, splits.end_of_text, run_dir)
                (run_dir / OPTIONS).write_text(options, encoding="utf-8")
                loggers = make_loggers(output.log_to, run_dir, config.to_dict())
                log = MetricsLog(run_dir / "metrics.jsonl", loggers=loggers)
            with log:
                with reporter.during(STARTING):
                    run = _Run(config, splits, tx, reporter, log, checkpoints, devices, initial)
                started()
                return run.run(should_stop)


def _identity(config: RunConfig, splits: Splits) -> dict[str, Any]:
    """Configuration and fingerprint of the text, which must be equal for a run to go on."""
    return config.to_dict() | {"text": splits.fingerprint}


class _Run:
    """The loop's variables, and the few things that are done with them in several places."""

    def __init__(
        self,
        config: RunConfig,
        splits: Splits,
        tx: optax.GradientTransformation | None,
        reporter: Reporter,
        log: MetricsLog,
        checkpoints: Checkpoints | None,
        devices: Devices,
        initial: Callable[[], Any] | None,
    ):
        self.config, self.splits, self.log, self.devices = config, splits, log, devices
        self.reporter, self.checkpoints = reporter, checkpoints
        adapter = config.adapter
        with on_the_host(config):
            self.apply, weights = make_model(
                config.model, config.seed, make_linear(adapter), devices.weights_at
            )
        if initial is not None and (checkpoints is None or checkpoints.latest() is None):
            weights = overlay(weights, initial())
        params, frozen = partition(devices.place(weights))
        optimization = make_optimization(config, params, tx)
        self.tx, schedule, _ = optimization
        self.schedule = None if schedule is None else jax.jit(schedule)
        step = make_step(config, self.apply, optimization, params)
        self.eval_step = make_eval_step(self.apply)
        initial_state = functools.partial(first_state, config, optimization)
        state_at = devices.state_at(jax.eval_shape(initial_state, params, frozen), self.tx)
        self.merge = make_merge(adapter, self.tx, params, config.seed, state_at)
        self.step_fn = devices.step(step, state_at)
        self.state = placed_state(config, optimization, params, frozen, state_at)
        self.batches = TrainBatches(config, splits, devices)
        self.guard = Guard(config.faults)
        if checkpoints is None and config.faults.rollback_on_spike is not None:
            raise ConfigError("--rollback-on-spike needs a directory of checkpoints to go back to")
        self._micro_step = 0
        if checkpoints is not None and checkpoints.latest() is not None:
            self._resume()
        log.rewind(self._micro_step // config.accumulate, self.guard.knows)
        # An optimizer of one's own may leave out gradients that are not finite.
        self._must_be_finite = ("loss", "grad_norm") if tx is None else ("loss",)
        self.diverged_at: int | None = None
        self.interrupted = False
        self._compiled = False
        self.memory: StepMemory | None = None
        self._pending: tuple[int, Metrics] | None = None
        self._validation: tuple[int, float] | None = None  # Step and loss of the last one.
        # Records of rollbacks and of dropped batches have no time.
        self._clock = Clock(max((r.get("seconds", 0.0) for r in log.records), default=0.0))

    def run(self, should_stop: Callable[[], bool]) -> Result:
        self.reporter.start(self._micro_step // self.config.accumulate, self.config.steps)
        self._clock.start()
        try:
            with self.devices.context():
                self._train(should_stop)
                self._flush()
                result = self._result()
                if result.finished:
                    self._evaluate("test", result.steps, should_stop)
                    result = dataclasses.replace(result, interrupted=self.interrupted)
                self.log.failed = result.diverged_at is not None
        finally:
            self.reporter.stop()
        return result

    def _train(self, should_stop: Callable[[], bool]) -> None:
        config = self.config
        if config.faults.rollback_on_spike is not None and self._micro_step == 0:
            self._save()  # There is always something to go back to.
        step = self._micro_step // config.accumulate
        # Within the next step the weights are still those after this one.
        if step and self._is_due(step, config.output.eval_every):
            self._evaluate("validation", step, should_stop)
        while self._micro_step < config.steps * config.accumulate:
            if self.interrupted or self.diverged_at is not None:
                break
            if not self._compiled and any(self.devices.gather(should_stop())):
                self.interrupted = True
                self._save()
                break
            rows = self.batches.next()
            if not self._compiled:
                self._compile(rows)
            self.state, metrics = self.step_fn(self.state, rows)
            stop = self.devices.agree(should_stop(), metrics)
            save = False
            if not self._skips(metrics):
                self._micro_step += 1
                step, unfinished = divmod(self._micro_step, config.accumulate)
                if not unfinished:
                    if config.adapter.merges_after(step) and step < config.steps:
                        self.state = self.merge(self.state)
                    save |= self._after_step(step, metrics, should_stop)
            stop |= self.interrupted
            if save or stop:
                self._save()
            if stop:
                break

    def _compile(self, rows: Any) -> None:
        """Compiles the step, which its first call then finds compiled, and says what it takes."""
        with self.reporter.during(COMPILING):
            compiled = self.step_fn.lower(self.state, rows).compile()
        self._compiled = True
        self.memory = of_compiled(compiled, self.state, self.tx, self.config.per_layer)
        if self.memory is not None:
            self.reporter.note(describe(self.memory))

    def _skips(self, metrics: Metrics) -> bool:
        """Whether the step has left the state as it was, because of this batch."""
        skipped = bool(metrics.pop("skipped", False))
        self.guard.skips(skipped)
        if skipped:
            self._flush()
            step = self._micro_step // self.config.accumulate + 1
            self.log.write(kind="skipped", step=step, skipped=self.guard.skipped)
            self.reporter.note(
                f"step {step}: dropped a batch whose gradient is not finite, {self.guard.skipped} "
                "so far"
            )
            if self.guard.gives_up:
                self.diverged_at = step
        return skipped

    def _after_step(self, step: int, metrics: Metrics, should_stop: Callable[[], bool]) -> bool:
        """Evaluates when it is time to; returns whether it is time for a checkpoint."""
        # Now that this step has been dispatched, fetch the metrics of the one before: the device
        # is never idle while the host waits for numbers.
        self._flush()
        self._pending = (step, metrics)
        if self.checkpoints is not None:
            self.checkpoints.check()
        if self.config.faults.rollback_on_spike is not None:
            self._flush()
            if self._micro_step < step * self.config.accumulate:
                return False  # It was rolled back.
        if self._is_due(step, self.config.output.eval_every):
            self._flush()
            if self.diverged_at is None:
                self._evaluate("validation", step, should_stop)
        return self._is_due(step, self.config.output.save_every)

    def _flush(self) -> None:
        """Waits for the last step and records its metrics."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in metrics.items()}
        seconds = self._clock.lap()
        finite = all(math.isfinite(metrics[name]) for name in self._must_be_finite)
        loss = metrics["loss"] if finite else math.nan
        if self._rolls_back(step, loss):
            return
        if not finite or self._is_due(step, self.config.output.log_every):
            metrics |= speed(self.config, self.config.tokens_per_step / seconds)
            if self.schedule is not None:
                metrics["learning_rate"] = float(jnp.asarray(self.schedule(step - 1)))
            self._record("train", step, **metrics)

    def _rolls_back(self, step: int, loss: float) -> bool:
        """Goes back to the last checkpoint if `loss` is a spike; the data go on from there."""
        # Before the first step there is nothing to go back to.
        if not self._micro_step or not self.guard.is_spike(loss):
            if not math.isfinite(loss):
                self.diverged_at = step
            return False
        self.guard.rolls_back(step, loss)
        self.guard.compare_with(self._restore()["guard"])
        self._micro_step = int(self.state.micro_step)
        back = self._micro_step // self.config.accumulate
        self.log.rewind(back, self.guard.knows)
        count = self.guard.rollbacks
        self.log.write(kind="rollback", step=back + 1, spike=step, loss=loss, rollbacks=count)
        self.reporter.note(f"step {step}: loss {loss:.4g}, back to step {back}, rollback {count}")
        self._clock.start()
        return True

    def _evaluate(self, split: str, step: int, should_stop: Callable[[], bool]) -> None:
        """Records the loss of a split, unless that is done, or it is told to stop before."""
        done = any(record["step"] == step for record in of_kind(self.log.records, split))
        if self.devices.gather(done)[0]:
            return
        batches = eval_batches(
            getattr(self.splits, split),
            self.config.batch_size,
            self.config.seq_len,
            documents_end=documents_end(self.config, self.splits),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        shared = (jax.tree.map(self.devices.share, batch) for batch in batches)
        with self.reporter.during(evaluating(split)):
            loss = mean_nll(
                self.eval_step,
                self.state.weights,
                shared,
                lambda: any(self.devices.gather(should_stop())),
            )
        if loss is None:
            self.interrupted = True
            return
        if split == "validation":
            self._validation = (step, loss)
        self._record(split, step, loss=loss)
        self._clock.start()

    def _record(self, kind: str, step: int, *, loss: float, **more: float) -> None:
        record = self.log.write(
            kind=kind,
            step=step,
            tokens=step * self.config.tokens_per_step,
            loss=loss,
            perplexity=perplexity(loss),
            **more,
            seconds=round(self._clock.seconds, 3),
        )
        self.reporter.record(record)

    def _save(self) -> None:
        self._flush()
        if self.diverged_at is None and not are_finite(self.state.params):
            # By an update: the loss before it was finite.
            self._rolls_back(self._micro_step // self.config.accumulate, math.nan)
        if self.checkpoints is None or self.diverged_at is not None:
            return
        data = {"positions": self.batches.positions(), "guard": self.guard.to_json()}
        step, loss = self._validation or (None, None)
        if step is None or step * self.config.accumulate != self._micro_step:
            loss = None
        self.checkpoints.save(self.state, data, _identity(self.config, self.splits), loss=loss)
        self._clock.start()

    def _restore(self) -> dict[str, Any]:
        """Takes the state of the newest checkpoint, and returns what else is in it."""
        assert self.checkpoints is not None
        self.state, data = self.checkpoints.restore(self.state)
        before = self.checkpoints.config().get("accumulate", self.config.accumulate)
        self.state = recounted(self.state, before, self.config.accumulate)
        step, unfinished = divmod(int(self.state.micro_step), self.config.accumulate)
        extended = self.checkpoints.config().get("steps") == step < self.config.steps
        if extended and not unfinished and self.config.adapter.merges_after(step):
            self.state = self.merge(self.state)  # Not done by the run that ended here.
        # Of before there was anything else.
        return data if "positions" in data else {"positions": [data], "guard": None}

    def _resume(self) -> None:
        """Goes on from the newest checkpoint."""
        data = self._restore()
        self.guard.restore(data["guard"])
        self._micro_step = int(self.state.micro_step)
        self.batches.go_to(data["positions"])

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.steps

    def _result(self) -> Result:
        steps = int(self.state.micro_step) // self.config.accumulate
        return Result(
            config=self.config,
            splits=self.splits,
            apply=self.apply,
            tx=self.tx,
            state=self.devices.local(self.state),
            records=self.log.records,
            steps=steps,
            diverged_at=self.diverged_at,
            memory=RunMemory(self.memory, observed_peak(self.memory)),
            interrupted=self.interrupted,
        )
