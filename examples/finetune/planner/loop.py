"""Fine-tuning of a planner with one method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.common import compare
from examples.common.cli import options_text
from examples.common.compare import Result, Setup, ShouldStop
from examples.common.metrics import Record, of_kind
from examples.common.reporter import Reporter
from examples.common.schedule import warmup_cosine
from examples.common.train_state import Params
from examples.finetune.planner.batches import learned_tokens, steps_per_epoch, train_steps
from examples.finetune.planner.evaluate import EVALUATED, Evaluator
from examples.finetune.planner.methods import set_up
from examples.finetune.planner.predictions import write_predictions
from examples.finetune.planner.prepare import Prepared
from examples.finetune.planner.run_config import RunConfig
from examples.finetune.planner.train_step import make_step
from examples.llama.model.config import parameter_count
from examples.llama.model.llama import with_params
from examples.llama.weights.files import PretrainedLlama, open_weights, read_params, replace_llama
from examples.pretrained import METHOD_MODEL


def train(
    config: RunConfig,
    method: str,
    prepared: Prepared,
    evaluator: Evaluator,
    untrained: dict[str, Any],
    run_dir: Path,
    reporter: Reporter,
    should_stop: ShouldStop = lambda: False,
    started: Callable[[], None] = lambda: None,
) -> Result:
    """Fine-tune the model with one method, and test the weights of the best epoch.

    Args:
      config: the whole configuration.
      method: one of `methods.LEARNING_RATES`.
      prepared: what `prepare(config)` returned.
      evaluator: of `prepared`.
      untrained: the validation of the model before the first step, `Evaluation.summary()`.
      run_dir: directory of metrics, checkpoints, predictions and the model.
      reporter: receives the progress.
      should_stop: see `compare.train`.
      started: see `compare.train`.

    Raises:
      ConfigError: see `compare.train`; if the method does not fit the model.
    """
    return compare.train(
        lambda: _set_up(config, method, prepared, evaluator, run_dir),
        method,
        config.identity() | {"method_name": method, "rows": prepared.fingerprint},
        reporter,
        should_stop,
        run_dir=run_dir,
        resume=config.output.resume,
        started=started,
        log_to=config.output.log_to,
        options=options_text(config, "examples.finetune.planner"),
        first={"kind": "validation", "step": 0, "epoch": 0.0, **untrained, "seconds": 0.0},
    )


def _set_up(
    config: RunConfig, method: str, prepared: Prepared, evaluator: Evaluator, run_dir: Path
) -> Setup:
    rows, layout = prepared.splits["train"].rows, prepared.layout
    per_epoch = steps_per_epoch(rows, config.rows_per_step)
    peak = config.method.peak(method)
    schedule = warmup_cosine(config.schedule, peak, config.epochs * per_epoch)
    tuning = set_up(method, config.method, prepared.model, prepared.read(), schedule, config.seed)

    def evaluate(split: str, weights: Params, should_stop: ShouldStop) -> Record | None:
        is_test = split == "test"
        params = read_best(prepared, run_dir) if is_test else tuning.plain(weights)
        found = evaluator(params, split, should_stop)
        if found is None:
            return None
        if is_test:
            title = f"{config.dataset}, test split: {config.model} after {method}"
            shown = config.output.shown
            write_predictions(found.predictions, run_dir, title=title, shown=shown)
        return found.summary()

    return Setup(
        tuning=tuning,
        learning_rate=peak,
        parameters=parameter_count(prepared.model),
        epochs=config.epochs,
        steps_per_epoch=per_epoch,
        batches=lambda start: train_steps(
            rows, layout, config.batch_size, config.accumulate, config.seed, start
        ),
        step=make_step(tuning.model, tuning.tx),
        describe=lambda steps: {"learned_tokens": sum(map(learned_tokens, steps))},
        evaluate=evaluate,
        summarize=_summary,
        best=best_epoch,
        keep=lambda weights: _save_best(tuning.plain(weights), prepared, run_dir),
        donate=True,
    )


def _summary(records: list[Record]) -> Record:
    best, test = best_epoch(records), of_kind(records, "test")[-1]
    return {
        "best_epoch": best["epoch"],
        "validation": {name: best[name] for name in EVALUATED},
        "test": {name: test[name] for name in EVALUATED},
    }


def best_epoch(records: list[Record]) -> Record:
    """The validation with the highest success rate after an epoch; of equal ones that of the
    lowest loss, then the earliest."""
    epochs = [record for record in of_kind(records, "validation") if record["step"] > 0]
    return max(epochs, key=lambda record: (record["metrics"]["success"], -record["loss"]))


def _save_best(params: Params, prepared: Prepared, run_dir: Path) -> None:
    """Writes plain weights in the Hugging Face layout, instead of those before."""
    chat = prepared.chat
    model = PretrainedLlama(
        with_params(prepared.model, params),
        prepared.model,
        chat.tokenizer,
        chat.template,
        chat.end_ids,
    )
    replace_llama(model, run_dir / METHOD_MODEL)


def read_best(prepared: Prepared, run_dir: Path) -> Params:
    """The weights of the best epoch, as they were written."""
    return read_params(open_weights(str(run_dir / METHOD_MODEL)), prepared.model)
