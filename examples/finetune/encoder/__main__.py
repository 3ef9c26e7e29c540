"""Fine-tune a BERT or RoBERTa: `python -m examples.finetune.encoder --help`."""

import sys
from typing import Any

from rich.console import Console

from examples.common import cli
from examples.common.accelerators import announce_devices
from examples.common.compare import Result, compare
from examples.common.config import write_json
from examples.common.interrupt import stop_on_signals
from examples.common.reporter import READING, Activity, make_reporter
from examples.common.run_directory import check_start, run_directory

try:
    from examples.finetune.encoder.baseline import baseline_scores
    from examples.finetune.encoder.data import TASKS
    from examples.finetune.encoder.loop import train
    from examples.finetune.encoder.prepare import prepare
    from examples.finetune.encoder.protocols import PROTOCOLS
    from examples.finetune.encoder.report import describe, summary_table
    from examples.finetune.encoder.run_config import RunConfig, preset_config
    from examples.finetune.encoder.sweep import (
        best_outcomes,
        run_names,
        sweep,
        sweep_record,
        sweep_table,
    )
except ModuleNotFoundError as error:
    cli.exit_without(error, "glue")

BRIEF = """
usage: python -m examples.finetune.encoder [options]

Fine-tune a BERT or RoBERTa with several methods. What most runs need:

  --task NAME            cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb of GLUE,
                         movie-snippets, own or own-regression
  --data DIRECTORY       files of rows: train and dev, .tsv, .csv or .jsonl
  --model NAME           a directory, a name on the hub, or minilm
  --methods NAME ...     adamw, lora, galore, natural-galore, ...
  --learning-rate RATE   its peak; each method has its own default
  --rank RANK            of the gradient subspace, and of LoRA's adapters
  --epochs EPOCHS        how often each row is seen
  --batch-size ROWS      rows in a batch
  --name NAME            directory of the runs under runs/glue/
  --resume               continue each method from its last checkpoint

  --config FILE          options from a file, such as config.yaml of a run
  --help-all             all options, with the defaults of --preset and --task

Ctrl-C or SIGTERM saves and stops; --resume goes on from there.
"""

SHORTHANDS: dict[str, tuple[str, ...]] = {}

_BASELINE = Activity("fitting the tf-idf baseline", "at once")


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.exit_code(lambda: run(parse(argv), cli.terminal()))


def parse(argv: list[str] | None) -> RunConfig:
    """The configuration: the preset of the task, and what the command line overrides."""
    argv = cli.expand(argv, SHORTHANDS, RunConfig)
    given = cli.peek(argv, preset="default", task="movie-snippets")
    # Unknown names are left to tyro, which lists the known ones.
    default = preset_config(
        given.preset if given.preset in PROTOCOLS else "default",
        given.task if given.task in TASKS else "movie-snippets",
    )
    return cli.parse(RunConfig, "examples.finetune.encoder", argv, default, brief=BRIEF)


def run(config: RunConfig, console: Console) -> int:
    """Train with each method, and write everything that belongs to the run."""
    run_dir = config.run_dir
    reporter = make_reporter(console, config.output.quiet, describe)
    announce_devices(reporter.note)
    check_start(run_dir, [run_dir / name for name in run_names(config)], config.output)
    reporter.note(f"{run_dir}: reading the model and the rows")
    with reporter.during(READING):
        prepared = prepare(config)
    for note in prepared.notes():
        reporter.note(note)
    sweep_summary: dict[str, Any] = {}
    with (
        run_directory(run_dir, config.output.overwrite, has_parts=True) as started,
        stop_on_signals(lambda: reporter.activity.stops) as stop,
    ):

        def tune(method: str) -> Result:
            where = {"run_dir": run_dir / method, "reporter": reporter}
            return train(config, method, prepared, **where, should_stop=stop, started=started)

        if config.sweep_learning_rates:
            outcomes = sweep(config, prepared, run_dir, reporter, console, stop, started)
            if outcomes is None:
                return stop.exit_code
            best = best_outcomes(outcomes, prepared.task)
            methods = [outcome.summary for outcome in best]
            sweep_summary = {"sweep": sweep_record(outcomes, best)}
            console.print(sweep_table(outcomes, best, prepared.task))
        else:
            results = compare(config.methods, tune, console, stop)
            if results is None:
                return stop.exit_code
            methods = [result.summary() for result in results]
    summary = {
        "task": config.task,
        "model": config.model,
        "rows": {name: len(part.tokens) for name, part in prepared.encoded.items()},
        "truncated": prepared.truncated,
        "methods": methods,
        **sweep_summary,
        "baseline": None,
    }
    # Before the baseline, which may take minutes and is not worth a run that is lost.
    write_json(run_dir / "summary.json", summary)
    with reporter.during(_BASELINE):
        summary["baseline"] = baseline_scores(prepared.task, prepared.rows)
    write_json(run_dir / "summary.json", summary)
    console.print(summary_table(summary))
    of_each = run_dir / ("METHOD-lrRATE" if config.sweep_learning_rates else "METHOD")
    lines = [f"files in {run_dir}"]
    if config.output.save_model and not config.sweep_learning_rates:
        lines.append(f"in the Hugging Face layout {of_each}/model")
        if not config.output.predict:
            lines.append("--resume --predict writes the labels of test rows")
    if config.output.predict:
        lines.append(f"labels of test rows in {of_each}/predictions")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
