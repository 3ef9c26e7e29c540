"""Descriptions of records and summaries for the terminal."""

from pathlib import Path

from rich.table import Table

from examples.common.cli import command
from examples.common.metrics import Record
from examples.llama.data import Splits, is_hub
from examples.llama.memory.peak import peak_rows
from examples.llama.model.config import MODEL_PRESETS
from examples.llama.result import Result
from examples.llama.run_config import RunConfig

MOST_EPOCHS = 4  # From here on, repeated text is worth less and less.


def warnings_of(config: RunConfig, splits: Splits) -> list[str]:
    """Warnings about a run that differs from its preset."""
    found, length = [], len(splits.train)
    epochs = config.steps * config.tokens_per_step / max(length, 1)
    if config.data.rows == "documents":
        rows = config.steps * config.batch_size * config.accumulate
        epochs = rows / max(splits.documents["train"], 1)
    if epochs > MOST_EPOCHS and not is_hub(config.data):
        found.append(
            f"the run reads its {length:,} tokens of training text {epochs:.0f} times: give more "
            "text with --data, or fewer --steps"
        )
    if config.init_from is not None and config.model.param_dtype == "bfloat16":
        found.append(
            "bfloat16 weights of a trained model hardly move at the learning rates of further "
            "training, because small updates round to nothing: use --model.param-dtype float32"
        )
    wanted = MODEL_PRESETS[config.preset].vocab_size
    asked_for = config.data.tokenizer is None and config.data.vocab_size == splits.vocab_size
    if config.init_from is None and splits.vocab_size < wanted and not asked_for:
        found.append(
            f"the tokenizer has {splits.vocab_size:,} tokens and the preset {config.preset} "
            f"{wanted:,}: the model is smaller than its name says"
        )
    return found


def summary_table(summary: Record) -> Table:
    """The summary of a run, for people."""
    table = Table(title=f"{summary['name']}: {summary['optimizer']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def row(name: str, value: str, style: str = "") -> None:
        table.add_row(name, value, style=style)

    row("parameters", f"{summary['parameters']:,}")
    if summary["adapter"] != "none":
        row(f"  trained ({summary['adapter']})", f"{summary['trained_parameters']:,}")
    row("optimizer state", _bytes(summary["optimizer_bytes"]))
    row("  AdamW's would be", _bytes(summary["adamw_bytes"]))
    for label, size in peak_rows(summary["memory"]):
        row(label, _bytes(size))
    row("tokens trained on", f"{summary['tokens']:,}")
    row("time in training", f"{summary['seconds']:.0f} s")
    table.add_section()
    for split in ("validation", "test"):
        row(f"{split} perplexity", f"{summary[split]['model']:.1f}", "bold")
        row("  of the bigram model", f"{summary[split]['bigram']:.1f}")
        row("  of the unigram model", f"{summary[split]['unigram']:.1f}")
    return table


def next_commands(result: Result) -> list[str]:
    """Command lines that sample, evaluate and export a finished run."""
    config, run_dir = result.config, result.config.run_dir
    held_out = ["--data", *config.data.data, "--split", "test"]
    prompt = ["--prompt", config.output.sample]
    if config.output.sample.startswith("-"):  # It would be read as an option.
        prompt = ["=".join(prompt)]
    return [
        _command("sample", run_dir, *prompt),
        _command("evaluate", run_dir, *held_out),
        _command(
            "export", run_dir, "--to", str(run_dir.with_name(f"{run_dir.name}-step{result.steps}"))
        ),
    ]


def _command(module: str, run_dir: Path, *options: str) -> str:
    return command(f"examples.llama.{module}", str(run_dir), *options)


def describe(record: Record) -> str:
    """A record in a few words."""
    text = f"ppl {record['perplexity']:.1f}"
    if record["kind"] != "train":
        return f"{record['kind']} {text}"
    mfu = f"  {100 * record['mfu']:.1f} % of peak" if "mfu" in record else ""
    return f"loss {record['loss']:.3f}  {text}  {record['tokens_per_second']:,.0f} tokens/s{mfu}"


def _bytes(number: int) -> str:
    return f"{number / 2**20:.1f} MiB"
