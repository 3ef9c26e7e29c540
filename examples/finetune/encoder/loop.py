"""Fine-tuning of an encoder with one method."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from examples.common import compare
from examples.common.cli import options_text
from examples.common.compare import Result, Setup, ShouldStop
from examples.common.metrics import Record
from examples.common.reporter import Activity, Reporter
from examples.common.schedule import warmup_linear
from examples.common.train_state import Params
from examples.finetune.encoder.data.batches import steps_per_epoch, train_batches
from examples.finetune.encoder.methods import set_up
from examples.finetune.encoder.prepare import Prepared
from examples.finetune.encoder.run_config import RunConfig
from examples.finetune.encoder.scores import scores
from examples.finetune.encoder.submission import write_submission
from examples.finetune.encoder.train_step import (
    decisions,
    make_predict,
    make_step,
    predictions,
    row_losses,
)
from examples.finetune.encoder.weights import save_model

_PREDICTING = Activity("predicting labels", "at the next batch of the predictions")


def train(
    config: RunConfig,
    method: str,
    prepared: Prepared,
    *,
    run_dir: Path | None = None,
    reporter: Reporter | None = None,
    should_stop: ShouldStop = lambda: False,
    started: Callable[[], None] = lambda: None,
) -> Result:
    """Fine-tune the model with one method.

    Args:
      config: the whole configuration.
      method: one of `methods.LEARNING_RATES`.
      prepared: what `prepare(config)` returned.
      run_dir: directory of metrics, checkpoints and the model. Without it nothing is written.
      reporter: receives the progress. Without it nothing is printed.
      should_stop: see `compare.train`; asked before each batch of the predictions too.
      started: see `compare.train`.

    Raises:
      ConfigError: see `compare.train`; if the method does not fit the model.
    """
    reporter = Reporter() if reporter is None else reporter
    result = compare.train(
        lambda: _set_up(config, method, prepared),
        method,
        config.identity() | {"method_name": method, "rows": prepared.fingerprint},
        reporter,
        should_stop,
        run_dir=run_dir,
        resume=config.output.resume,
        started=started,
        log_to=config.output.log_to,
        options=options_text(config, "examples.finetune.encoder"),
    )
    if run_dir is None or not result.finished:
        return result
    if config.output.save_model:
        pretrained, labels = prepared.pretrained, prepared.rows.labels
        save_model(
            result.tuning.plain(result.state.weights),
            pretrained.config,
            pretrained.raw_config,
            labels,
            prepared.unit,
            pretrained.directory,
            run_dir / "model",
        )
    if config.output.predict:
        with reporter.during(_PREDICTING):
            done = write_predictions(result, prepared, run_dir / "predictions", should_stop)
        # A resumed run trains no further, and predicts.
        result = dataclasses.replace(result, finished=done)
    return result


def write_predictions(
    result: Result, prepared: Prepared, directory: Path, should_stop: ShouldStop = lambda: False
) -> bool:
    """Write what the trained weights predict for the rows of --predict; False if told to stop."""
    predict, task = make_predict(result.tuning.model), prepared.task
    found = {}
    for split, encoded in prepared.predicted.items():
        outputs = predictions(predict, result.state.weights, encoded, prepared.layout, should_stop)
        if outputs is None:
            return False
        found[split] = decisions(outputs, task.regression)
        if task.regression:
            mean, size = prepared.unit
            found[split] = mean + size * found[split].astype(np.float64)
    write_submission(task, prepared.rows.labels, found, directory)
    return True


def _set_up(config: RunConfig, method: str, prepared: Prepared) -> Setup:
    task, pretrained = prepared.task, prepared.pretrained
    rows, layout = prepared.encoded["train"], prepared.layout
    per_epoch = steps_per_epoch(rows, config.batch_size)
    peak = config.method.peak(method)
    schedule = warmup_linear(peak, config.warmup, config.epochs * per_epoch)
    tuning = set_up(
        method, config.method, pretrained.config, pretrained.params, schedule, config.seed
    )
    predict = make_predict(tuning.model)

    def evaluate(split: str, weights: Params, should_stop: ShouldStop) -> Record | None:
        encoded = prepared.encoded[split]
        outputs = predictions(predict, weights, encoded, layout, should_stop)
        if outputs is None:
            return None
        losses = row_losses(jnp.asarray(outputs), encoded.labels, task.regression)
        found = decisions(outputs, task.regression)
        metrics = scores(task.metrics, encoded.labels, found)
        return {"metrics": metrics, "loss": float(jnp.mean(losses))}

    return Setup(
        tuning=tuning,
        learning_rate=peak,
        parameters=sum(x.size for x in jax.tree.leaves((tuning.trained, tuning.frozen))),
        epochs=config.epochs,
        steps_per_epoch=per_epoch,
        batches=lambda start: train_batches(rows, layout, config.seed, start),
        step=make_step(tuning.model, tuning.tx, regression=task.regression, seed=config.seed),
        describe=lambda batches: {"batches": len(batches)},
        evaluate=evaluate,
        summarize=_summary,
        validation=task.validation,
        test=task.test,
        log_every=config.output.log_every,
    )


def _summary(records: list[Record]) -> Record:
    last = {record["kind"]: record for record in records if record["kind"] != "train"}
    return {
        "losses": {kind: record["loss"] for kind, record in last.items()},
        "metrics": {kind: record["metrics"] for kind, record in last.items()},
    }
