"""Fine-tune a BERT or RoBERTa: `python -m examples.finetune.encoder --help`."""

import argparse
import json
import shutil
import sys

import tyro
from rich.console import Console

from examples.common.compare import Result, compare
from examples.common.errors import CheckpointError, ConfigError, DataError, WeightsError
from examples.common.interrupt import stop_on_signals
from examples.common.reporter import make_reporter
from examples.finetune.encoder.baseline import baseline_scores
from examples.finetune.encoder.data import TASKS
from examples.finetune.encoder.loop import train
from examples.finetune.encoder.prepare import prepare
from examples.finetune.encoder.protocols import PROTOCOLS
from examples.finetune.encoder.report import describe, summary_table
from examples.finetune.encoder.run_config import RunConfig, preset_config


def main(argv: list[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    console = Console()
    try:
        return run(parse(argv), console)
    except (ConfigError, DataError, WeightsError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(argv: list[str] | None) -> RunConfig:
    """The configuration: the preset's for the task, with what else the command line says."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="default")
    first.add_argument("--task", default="movie-snippets")
    given = first.parse_known_args(argv)[0]
    # Unknown names are left to tyro, which lists the known ones.
    default = preset_config(
        given.preset if given.preset in PROTOCOLS else "default",
        given.task if given.task in TASKS else "movie-snippets",
    )
    return tyro.cli(
        RunConfig,
        prog="python -m examples.finetune.encoder",
        default=default,
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def run(config: RunConfig, console: Console) -> int:
    """Trains with each method, and writes everything that belongs to the run."""
    run_dir = config.run_dir
    reporter = make_reporter(console, config.output.quiet, describe)
    reporter.note(f"{run_dir}: reading the model and the rows")
    prepared = prepare(config)
    for note in prepared.notes():
        reporter.note(note)
    if config.output.overwrite and run_dir.exists():
        shutil.rmtree(run_dir)
    with stop_on_signals() as stop:

        def tune(method: str) -> Result:
            given = {"run_dir": run_dir / method, "reporter": reporter, "should_stop": stop}
            return train(config, method, prepared, **given)

        results = compare(config.methods, tune, console, stop)
    if results is None:
        return stop.exit_code
    summary = {
        "task": config.task,
        "model": config.model,
        "rows": {name: len(part.tokens) for name, part in prepared.encoded.items()},
        "truncated": prepared.truncated,
        "methods": [result.summary() for result in results],
        "baseline": None
        if prepared.task.regression
        else baseline_scores(prepared.task, prepared.rows),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(summary_table(summary))
    console.print(f"files in {run_dir}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
