"""Evaluation of the model before it is trained: the same for all methods."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.common.config import (
    Json,
    check_same,
    differences,
    refuse_unless_resumed,
    write_json,
)
from examples.common.reporter import Reporter, evaluating
from examples.common.run_directory import UNTRAINED as FILE
from examples.common.text import parse_json
from examples.finetune.planner.evaluate import Evaluator
from examples.finetune.planner.predictions import write_predictions
from examples.finetune.planner.prepare import Prepared
from examples.finetune.planner.run_config import RunConfig

NAME = "untrained"
# Settings that decide which records are evaluated, and as which tokens.
_OF_ROWS = ("dataset", "data", "parts", "skip_unusable", "held_out", "max_length")
_OF_ROWS += ("limit", "eval_limit", "prompt")


def check_untrained(config: RunConfig, run_dir: Path) -> None:
    """Raise a ConfigError if `run_dir` has an evaluation of a run that is not to go on."""
    if (run_dir / FILE).exists() and not config.output.overwrite:
        refuse_unless_resumed(run_dir, config.output.resume)


def evaluate_untrained(
    config: RunConfig,
    prepared: Prepared,
    evaluator: Evaluator,
    run_dir: Path,
    reporter: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Its validation and test, `Evaluation.summary()`; None if it was told to stop.

    It is written into `run_dir`, and read again by a run that goes on. The test's predictions are
    written into the directory `NAME` there.

    Raises:
      ConfigError: if there is a run that is not to be resumed, or was made from something else.
    """
    path = run_dir / FILE
    settings = config.identity()
    names = ("model", "dtype", "new_tokens", *_OF_ROWS)
    made_from = {name: settings[name] for name in names} | {"rows": prepared.fingerprint}
    if path.exists():
        refuse_unless_resumed(run_dir, config.output.resume)
        found = parse_json(path.read_text(encoding="utf-8"), str(path))
        # An older file has fewer settings; the fingerprint of the rows covers them.
        known = {name: value for name, value in made_from.items() if name in found["made_from"]}
        check_same(run_dir, found["made_from"], known, _changed)
        return found
    params = prepared.read()
    found = {"made_from": made_from}
    for split in ("validation", "test"):
        with reporter.during(evaluating(split, len(prepared.splits[split].records))):
            evaluation = evaluator(params, split, should_stop)
        if evaluation is None:
            return None
        found[split] = evaluation.summary()
        if split == "test":
            title = f"{config.dataset}, test split: {config.model}, untrained"
            shown = config.output.shown
            write_predictions(evaluation.predictions, run_dir / NAME, title=title, shown=shown)
    write_json(path, found)
    return found


def _changed(old: Json, new: Json) -> list[str]:
    """The settings that differ; the rows, which follow from them, only if no setting does."""
    found = differences(old, new)
    return [text for text in found if not text.startswith("rows:")] or found
