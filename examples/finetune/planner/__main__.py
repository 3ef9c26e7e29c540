"""Fine-tune a LLaMA on plans of tool calls: `python -m examples.finetune.planner --help`."""

import sys

from rich.console import Console

from examples.common import cli
from examples.common.accelerators import announce_devices
from examples.common.compare import Result, compare
from examples.common.config import write_json
from examples.common.interrupt import stop_on_signals
from examples.common.plots import plot_methods
from examples.common.reporter import READING, make_reporter
from examples.common.run_directory import check_start, run_directory

try:
    from examples.finetune.planner.evaluate import Evaluator
    from examples.finetune.planner.loop import train
    from examples.finetune.planner.predictions import side_by_side
    from examples.finetune.planner.prepare import prepare
    from examples.finetune.planner.report import brief, describe, evaluation, summary_table
    from examples.finetune.planner.run_config import PRESETS, RunConfig, preset_config
    from examples.finetune.planner.untrained import (
        NAME as UNTRAINED,
        check_untrained,
        evaluate_untrained,
    )
except ModuleNotFoundError as error:
    cli.exit_without(error, "functions")

BRIEF = """
usage: python -m examples.finetune.planner [options]

Fine-tune a LLaMA on plans of tool calls. What most runs need:

  --dataset NAME         nestful, bfcl or tinyagent
  --data PATH            local files of the data set
  --model NAME           a GGUF file, a directory, a name on the hub, or
                         smollm2-135m-instruct
  --methods NAME ...     adamw, lora, galore, natural-galore, ...
  --learning-rate RATE   its peak; each method has its own default
  --rank RANK            of the gradient subspace, and of LoRA's adapters
  --epochs EPOCHS        how often each row is seen
  --bf16                 products in bfloat16, weights in float32
  --name NAME            directory of the runs under runs/function_calling/
  --resume               continue each method from its last checkpoint

  --config FILE          options from a file, such as config.yaml of a run
  --help-all             all options

Ctrl-C or SIGTERM saves and stops; --resume goes on from there.
"""
SHORTHANDS = cli.bf16_shorthands("--dtype")


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.exit_code(lambda: run(parse(argv), cli.terminal()))


def parse(argv: list[str] | None) -> RunConfig:
    """The configuration: the preset, and what the command line overrides."""
    argv = cli.expand(argv, SHORTHANDS, RunConfig)
    preset = cli.peek(argv, preset="default").preset
    # An unknown name is left to tyro, which lists the known ones.
    default = preset_config(preset if preset in PRESETS else "default")
    return cli.parse(RunConfig, "examples.finetune.planner", argv, default, brief=BRIEF)


def run(config: RunConfig, console: Console) -> int:
    """Train with each method, and write everything that belongs to the run."""
    run_dir = config.run_dir
    reporter = make_reporter(console, config.output.quiet, describe, brief)
    announce_devices(reporter.note)
    check_start(run_dir, [run_dir / name for name in config.methods], config.output)
    check_untrained(config, run_dir)
    reporter.note(f"{run_dir}: reading the model and the records")
    with reporter.during(READING):
        prepared = prepare(config)
    for note in prepared.notes:
        reporter.note(note)
    evaluator = Evaluator(
        prepared,
        batch_size=config.batch_size,
        plans_at_once=config.eval_batch_size,
        new_tokens=config.new_tokens,
    )
    with (
        run_directory(run_dir, config.output.overwrite, has_parts=True) as started,
        stop_on_signals(lambda: reporter.activity.stops) as stop,
    ):
        untrained = evaluate_untrained(config, prepared, evaluator, run_dir, reporter, stop)
        if untrained is None:
            console.print("stopped before the training: nothing is saved")
            return stop.exit_code
        reporter.note(f"untrained: validation {evaluation(untrained['validation'])}")

        def tune(method: str) -> Result:
            given = (prepared, evaluator, untrained["validation"], run_dir / method)
            return train(config, method, *given, reporter, stop, started)

        results = compare(config.methods, tune, console, stop)
    if results is None:
        return stop.exit_code
    summary = {
        "dataset": config.dataset,
        "model": config.model,
        "records": {name: len(split.records) for name, split in prepared.splits.items()},
        "too_long": {name: split.too_long for name, split in prepared.splits.items()},
        "untrained": untrained,
        "methods": [result.summary() for result in results],
    }
    write_json(run_dir / "summary.json", summary)
    curves = {method: r.records for method, r in zip(config.methods, results, strict=True)}
    plot_methods(curves, run_dir / "curves.png", f"{config.dataset}, {config.model}")
    names = (UNTRAINED, *config.methods)
    console.print(side_by_side(run_dir, names, config.output.side_by_side))
    console.print(summary_table(summary))
    for line in (
        f"files in {run_dir}",
        f"in the Hugging Face layout {run_dir}/METHOD/model",
        f"plans of the test split in {run_dir}/METHOD/predictions.md",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
