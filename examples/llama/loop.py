"""The training loop, as a function from a configuration to a result."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng
from examples.llama.adapters import make_linear
from examples.llama.build import first_state, make_step
from examples.llama.checkpoints import Checkpoints
from examples.llama.clock import Clock
from examples.llama.data import (
    Splits,
    eval_batches,
    is_hub,
    load_splits,
    make_streaming_iterator,
    make_train_iterator,
)
from examples.llama.evaluate import make_eval_step, mean_nll, perplexity
from examples.llama.frozen import partition
from examples.llama.metrics import MetricsLog, Record, of_kind
from examples.llama.optimization import make_optimization
from examples.llama.peak import RunMemory, describe, observed_peak
from examples.llama.relora import make_merge
from examples.llama.report import Reporter, Silent
from examples.llama.step_memory import StepMemory, of_compiled
from examples.llama.train_config import RunConfig
from examples.llama.train_step import (
    Apply,
    Metrics,
    TrainState,
    make_model,
)


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    config: RunConfig
    """With the vocabulary of the tokenizer."""
    splits: Splits
    apply: Apply
    """The model: `(weights, tokens (B, T)) -> logits (B, T, V)`."""
    tx: optax.GradientTransformation
    state: TrainState
    records: list[Record]
    """Metrics of every logged step and every evaluation; see `metrics.of_kind`."""
    steps: int
    """Optimizer steps done: fewer than `config.steps` if the run was stopped or diverged."""
    diverged: bool
    """Whether the loss became infinite or not a number."""
    memory: RunMemory
    """What a step takes, and the peak that was seen."""

    @property
    def params(self) -> Any:
        """The parameters that were trained: what `tx` is for."""
        return self.state.float_params

    @property
    def weights(self) -> Any:
        """All parameters, the frozen ones of LoRA included: what `apply` takes."""
        return self.state.weights

    @property
    def finished(self) -> bool:
        return self.steps == self.config.steps and not self.diverged


def train(
    config: RunConfig,
    *,
    splits: Splits | None = None,
    tx: optax.GradientTransformation | None = None,
    run_dir: Path | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Trains a model as `config` says.

    Args:
      config: The whole configuration.
      splits: The text as tokens; by default what `config.data` names.
      tx: An optimizer to use in place of `config.optimizer`. It sees one gradient for each
        micro-batch, of the trained parameters only, or with `config.accumulate_in_subspace` one
        low-rank gradient for each step; its learning rate is its own and is not recorded.
        ReLoRA's restarts multiply its updates.
      run_dir: Where metrics and checkpoints go. Without it nothing is written.
      reporter: Is told about progress. Without it nothing is printed.
      should_stop: Asked after each micro-batch; once true, the run is saved and ends.

    Returns:
      The state after the last step and the records of all steps, those before a resume included.

    Raises:
      ConfigError: if `run_dir` holds a run that is not to be resumed, or one with another
        configuration; if the optimizer does not fit the model, ReLoRA or the accumulation.
    """
    splits = splits if splits is not None else load_splits(config.data)
    config = config.with_vocabulary(splits.vocab_size)
    reporter = reporter if reporter is not None else Silent()
    if run_dir is None:
        return _Run(config, splits, tx, reporter, MetricsLog(), None).run(should_stop)

    run_dir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(run_dir / "checkpoints", keep=config.output.keep) as checkpoints:
        identity = _identity(config, splits)
        done = checkpoints.resume_point(identity, run_dir, resume=config.output.resume)
        if config.output.resume:
            reporter.note(f"resuming after step {done // config.accumulate}")
        (run_dir / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        log = MetricsLog(run_dir / "metrics.jsonl", resume_at=done // config.accumulate)
        with log:
            return _Run(config, splits, tx, reporter, log, checkpoints).run(should_stop)


def _identity(config: RunConfig, splits: Splits) -> dict[str, Any]:
    """What must be equal for a run to go on: the configuration, and the text itself."""
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
    ):
        self.config, self.splits, self.log = config, splits, log
        self.reporter, self.checkpoints = reporter, checkpoints
        adapter = config.adapter
        self.apply, weights = make_model(config.model, config.seed, make_linear(adapter))
        params, frozen = partition(weights)
        optimization = make_optimization(config, params, tx)
        self.tx, schedule, _ = optimization
        self.schedule = None if schedule is None else jax.jit(schedule)
        self.merge = make_merge(adapter, self.tx, params, config.seed)
        self.step_fn = make_step(config, self.apply, optimization, params)
        self.eval_step = make_eval_step(self.apply)
        # The weights are donated: there is no room for them twice.
        first = jax.jit(
            lambda p, f: first_state(config, optimization, p, f),
            # Nor can a buffer of floats become one of codes.
            donate_argnums=(0, 1) if config.weight_bits is None else (),
        )
        self.state = first(params, frozen)
        if config.offload == "weights":
            params = self.state.params
            on_host = {**params, "layers": ng.to_host(params["layers"])}
            self.state = self.state._replace(params=on_host)
        self.batches = _batches(config, splits)
        if checkpoints is not None and checkpoints.latest() is not None:
            self.state, position = checkpoints.restore(self.state)
            self.batches.set_state(position)
        self.diverged = False
        self.memory: StepMemory | None = None
        self._pending: tuple[int, Metrics] | None = None
        self._clock = Clock(log.records[-1]["seconds"] if log.records else 0.0)

    def run(self, should_stop: Callable[[], bool]) -> Result:
        config = self.config
        start, end = int(self.state.micro_step), config.steps * config.accumulate
        self.reporter.start(start // config.accumulate, config.steps)
        self._clock.start()
        try:
            for micro_step in range(start + 1, end + 1):
                rows = next(self.batches)["tokens"]
                if micro_step == start + 1:
                    self._account(rows)
                self.state, metrics = self.step_fn(self.state, rows)
                stop = should_stop()
                step, unfinished = divmod(micro_step, config.accumulate)
                if not unfinished:
                    if config.adapter.merges_after(step) and step < config.steps:
                        self.state = self.merge(self.state)
                    self._after_step(step, metrics)
                if stop or (not unfinished and self._is_due(step, config.output.save_every)):
                    self._save()
                if stop or self.diverged:
                    break
            self._flush()
            result = self._result()
            if result.finished and not of_kind(self.log.records, "test"):
                self._evaluate("test", result.steps)
        finally:
            self.reporter.stop()
        return result

    def _account(self, rows: Any) -> None:
        """Compiles the step, which its first call then finds compiled, and says what it takes."""
        compiled = self.step_fn.lower(self.state, rows).compile()
        self.memory = of_compiled(compiled, self.state, self.tx, self.config.per_layer)
        if self.memory is not None:
            self.reporter.note(describe(self.memory))

    def _after_step(self, step: int, metrics: Metrics) -> None:
        # Now that this step has been dispatched, fetch the metrics of the one before: the device
        # is never idle while the host waits for numbers.
        self._flush()
        self._pending = (step, metrics)
        if self._is_due(step, self.config.output.eval_every):
            self._flush()
            if not self.diverged:
                self._evaluate("validation", step)

    def _flush(self) -> None:
        """Waits for the last step and records its metrics."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in metrics.items()}
        seconds = self._clock.lap()
        self.diverged |= not math.isfinite(metrics["loss"])
        if self.diverged or self._is_due(step, self.config.output.log_every):
            metrics["tokens_per_second"] = round(self.config.tokens_per_step / seconds, 1)
            if self.schedule is not None:
                metrics["learning_rate"] = float(jnp.asarray(self.schedule(step - 1)))
            self._record("train", step, **metrics)

    def _evaluate(self, split: str, step: int) -> None:
        batches = eval_batches(
            getattr(self.splits, split), self.config.batch_size, self.config.seq_len
        )
        self._record(split, step, loss=mean_nll(self.eval_step, self.state.weights, batches))
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
        if self.checkpoints is not None and not self.diverged:
            self.checkpoints.save(
                self.state, self.batches.get_state(), _identity(self.config, self.splits)
            )
            self._clock.start()

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.steps

    def _result(self) -> Result:
        steps = int(self.state.micro_step) // self.config.accumulate
        return Result(
            config=self.config,
            splits=self.splits,
            apply=self.apply,
            tx=self.tx,
            state=self.state,
            records=self.log.records,
            steps=steps,
            diverged=self.diverged,
            memory=RunMemory(self.memory, observed_peak(self.memory)),
        )


def _batches(config: RunConfig, splits: Splits) -> grain.DatasetIterator:
    """Training batches without end, this process's share of them."""
    rows = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    rows |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
    if is_hub(config.data):
        return make_streaming_iterator(config.data, splits, **rows)
    return make_train_iterator(splits.train, seed=config.seed, **rows)
