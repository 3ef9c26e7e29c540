"""Pre-train a LLaMA from the command line: `python -m examples.llama --help`."""

import contextlib
import sys
import traceback
from pathlib import Path

import jax
import optax
from rich.console import Console

import natgalore_jax as ng
from examples.common import cli
from examples.common.accelerators import announce_devices
from examples.common.config import write_json
from examples.common.errors import ConfigError, DataError, WeightsError
from examples.common.interrupt import GO_ON, stop_on_signals
from examples.common.metrics import Record, of_kind
from examples.common.plots import plot_run
from examples.common.reporter import READING, Activity, Reporter, make_reporter
from examples.common.run_directory import check_start
from examples.llama.data import document_rows, load_splits, ngram_perplexity
from examples.llama.data.tokenizer import for_prompts
from examples.llama.distributed.devices import make_devices
from examples.llama.distributed.processes import abort_peers, several_processes, start
from examples.llama.loop import Result, train
from examples.llama.model.adapters import without_adapters
from examples.llama.model.config import MODEL_PRESETS
from examples.llama.model.generate import Sampling
from examples.llama.model.llama import with_params
from examples.llama.report import describe, next_commands, summary_table, warnings_of
from examples.llama.run_config import RunConfig, run_preset
from examples.llama.sample import continued
from examples.llama.training.build import check_config
from examples.llama.weights.files import PretrainedLlama, replace_llama
from examples.llama.weights.initial import start_from
from examples.llama.weights.runs import EXPORT
from examples.pretrained.json_file import read_json

SAMPLE_TOKENS = 100
RESULTS = Activity("writing summary, sample and export", "at once")

BRIEF = """
usage: python -m examples.llama [options]

Pre-train a LLaMA on text. What most runs need:

  --preset NAME          sizes of model and run: nano, 9m, 60m, 130m, ..., 7b
  --data FILE ...        text to train on: files, directories, hf:NAME
  --optimizer NAME       natural-galore (default), galore, fira, adamw, ...
  --learning-rate RATE   its peak; each optimizer has its own default
  --rank RANK            dimension of the gradient subspace
  --steps STEPS          optimizer steps
  --batch-size ROWS      rows in a batch; --accumulate batches make a step
  --bf16                 products in bfloat16, weights in float32
  --name NAME            directory of the run under runs/
  --resume               continue the run from its last checkpoint

  --config FILE          options from a file, such as runs/NAME/config.yaml
  --help-all             all options, with the defaults of the preset

Ctrl-C or SIGTERM saves and stops; --resume goes on from there.
"""
SHORTHANDS = cli.bf16_shorthands("--model.dtype")


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    try:
        return cli.exit_code(lambda: run(parse(argv), cli.terminal()), abort_peers)
    except Exception:
        # Such as what the sum of a gradient raises when another process has died.
        if several_processes():
            traceback.print_exc()
            abort_peers(1)
        raise


def parse(argv: list[str] | None) -> RunConfig:
    """The configuration: the preset, and what the command line overrides."""
    argv = cli.expand(argv, SHORTHANDS, RunConfig)
    presets = cli.values_of(argv, "--preset")
    if len(set(presets)) > 1:
        raise ConfigError(
            f"--preset {' and '.join(presets)}: the config.yaml of a run has all sizes of its "
            "preset: leave out the other"
        )
    preset = cli.peek(argv, preset="nano").preset
    # An unknown name is left to tyro, which lists the known ones.
    default = run_preset(preset if preset in MODEL_PRESETS else "nano")
    config = cli.parse(RunConfig, "examples.llama", argv, default, brief=BRIEF)
    # The config.yaml of a run from trained weights has the vocabulary of these.
    if config.init_from is None and config.model.vocab_size != default.model.vocab_size:
        raise ConfigError(
            "without --init-from the model's vocabulary follows the tokenizer's: use --vocab-size, "
            f"not --model.vocab-size {config.model.vocab_size}"
        )
    return config


def run(config: RunConfig, console: Console) -> int:
    """Train, and write everything that belongs to the run."""
    start(config.distributed)
    leads = jax.process_index() == 0
    run_dir, quiet = config.run_dir, config.output.quiet
    reporter = make_reporter(console, quiet or not leads, describe)
    if leads:
        announce_devices(reporter.note, None if config.distributed.enabled else 1)
        check_start(run_dir, [run_dir], config.output)
    make_devices(config.distributed, config.batch_size)  # Refuses a batch that cannot be shared.
    if config.init_from is None:
        check_config(config)
    reporter.note(f"{run_dir}: reading text and tokenizer")
    tokenizer = initial = None
    with reporter.during(READING):
        if config.init_from is not None:
            config, tokenizer, initial, note = start_from(config)
            reporter.note(note)
            check_config(config)
        splits = load_splits(config.data, tokenizer)
    for warning in warnings_of(config, splits) if leads else ():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    with stop_on_signals(lambda: reporter.activity.stops) as stop:
        result = train(
            config,
            splits=splits,
            run_dir=run_dir,
            reporter=reporter,
            should_stop=stop,
            initial=initial,
        )
    config = result.config
    if result.diverged:
        raise ConfigError(
            f"the loss, the gradient or the weights are not finite at step {result.diverged_at}: "
            f"try a --learning-rate below {config.learning_rate:g}"
        )
    # By a signal, which another process may have got, or which came after the last batch.
    if not result.finished or stop():
        if leads:
            console.print(f"stopped at step {result.steps}, saved; {GO_ON}", soft_wrap=True)
        return stop.exit_code
    if leads:
        _write_results(result, run_dir, console, reporter)
    return 0


def _write_results(result: Result, run_dir: Path, console: Console, reporter: Reporter) -> None:
    """Summary, curves, sample and export of a finished run."""
    with reporter.during(RESULTS):
        summary, path = summarize(result), run_dir / "summary.json"
        if result.memory.predicted is None and path.exists():
            # A finished run that was resumed: nothing was compiled, and no step was measured.
            with contextlib.suppress(WeightsError, LookupError, TypeError):  # Of an older version.
                summary["memory"] = read_json(path)["memory"]
        write_json(path, summary)
        plot_run(
            result.records,
            run_dir / "curves.png",
            {name: summary["validation"][name] for name in ("bigram", "unigram")},
            title=summary["name"],
        )
        trained = pretrained(result)
        replace_llama(trained, run_dir / EXPORT)
        try:
            text = write_sample(trained, result.config)
        except DataError as error:
            text = f"no sample: {error}"
        (run_dir / "sample.txt").write_text(text + "\n", encoding="utf-8")
    reporter.note(f"\n{text}\n")
    console.print(summary_table(summary))
    console.print(
        f"files in {run_dir}; in the Hugging Face layout {run_dir / EXPORT}",
        highlight=False,
        soft_wrap=True,
    )
    if not result.config.output.quiet:
        # One line each, whatever the width of the terminal, to be copied.
        for command in next_commands(result):
            console.print(command, highlight=False, markup=False, soft_wrap=True)


def summarize(result: Result) -> Record:
    """The numbers of a finished run."""
    config, splits = result.config, result.splits
    last = result.records[-1]
    memory = ng.memory_report(result.tx, result.params)
    adamw = optax.adamw(1.0)
    if config.accumulate > 1:  # It would have a sum of gradients too.
        adamw = optax.MultiSteps(adamw, config.accumulate).gradient_transformation()
    accumulator = sum(x.nbytes for x in jax.tree.leaves(result.state.accumulated))
    summary = {
        "name": config.run_dir.name,
        "optimizer": config.optimizer.name,
        "adapter": config.adapter.kind,
        "learning_rate": config.learning_rate,
        "parameters": sum(p.size for p in jax.tree.leaves(result.weights)),
        "trained_parameters": sum(p.size for p in jax.tree.leaves(result.params)),
        "optimizer_bytes": memory.total_state_bytes + accumulator,
        "adamw_bytes": ng.memory_report(adamw, result.params).total_state_bytes,
        "memory": result.memory.to_dict(),
        "steps": result.steps,
        "tokens": last["tokens"],
        "seconds": last["seconds"],
    }
    for split in ("validation", "test"):
        held_out = getattr(splits, split)
        if config.data.rows == "documents":
            held_out = document_rows(held_out, config.seq_len, splits.end_of_text)
        baselines = ngram_perplexity(splits.train, held_out, splits.vocab_size)
        model = of_kind(result.records, split)[-1]["perplexity"]
        summary[split] = {"model": model, **baselines}
    return summary


def pretrained(result: Result) -> PretrainedLlama:
    """The trained model without adapters, and its tokenizer for prompts."""
    config, splits = result.config, result.splits
    # A text had no token before it in training, only perhaps where the weights are from.
    tokenizer = for_prompts(splits.tokenizer, start=config.init_from is not None)
    params = without_adapters(config.adapter, result.weights)
    model = with_params(config.model, params)
    return PretrainedLlama(model, config.model, tokenizer, None, (splits.end_of_text,))


def write_sample(trained: PretrainedLlama, config: RunConfig) -> str:
    """The prompt of `config`, continued by the model."""
    assert trained.tokenizer is not None
    return "".join(
        continued(
            trained.model,
            trained.tokenizer,
            config.output.sample,
            SAMPLE_TOKENS,
            Sampling(temperature=0.8, top_k=50),
            jax.random.key(config.seed),
            trained.end_ids,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
