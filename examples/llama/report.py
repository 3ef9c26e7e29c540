"""Descriptions of records and summaries for the terminal."""

from rich.table import Table

from examples.common.metrics import Record
from examples.llama.memory.peak import peak_rows


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


def describe(record: Record) -> str:
    """A record in a few words."""
    text = f"ppl {record['perplexity']:.1f}"
    if record["kind"] != "train":
        return f"{record['kind']} {text}"
    return f"loss {record['loss']:.3f}  {text}  {record['tokens_per_second']:,.0f} tokens/s"


def _bytes(number: int) -> str:
    return f"{number / 2**20:.1f} MiB"
