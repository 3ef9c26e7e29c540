"""Descriptions of records and summaries for the terminal."""

from collections.abc import Callable
from typing import Any

from rich.table import Table

from examples.common.metrics import Record

_SHARES = {
    "parsed": "plans",
    "success": "success",
    "aware_success": "with arguments",
    "tool_precision": "tool precision",
    "tool_recall": "tool recall",
}


def brief(record: Record) -> str:
    """A record beside a progress bar."""
    if record["kind"] == "train":
        return describe(record)
    return f"{record['kind']} {record['loss']:.3f}, {100 * record['metrics']['success']:.0f} %"


def describe(record: Record) -> str:
    """A record in a line of a log."""
    if record["kind"] == "train":
        return f"loss {record['loss']:.3f}"
    return f"{record['kind']} {evaluation(record)}"


def evaluation(found: dict[str, Any]) -> str:
    """An evaluation in a few words; shares are in percent."""
    shares = ", ".join(
        f"{text} {100 * found['metrics'][name]:.1f}" for name, text in _SHARES.items()
    )
    return f"loss {found['loss']:.3f}, {shares}"


def summary_table(summary: dict[str, Any]) -> Table:
    """The methods side by side, tested after their best epoch. Shares are in percent."""
    runs = [summary["untrained"], *summary["methods"]]
    table = Table(title=f"{summary['dataset']}, {summary['model']}, test split")
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(run.get("method", "untrained"), justify="right")

    def add(text: str, key: str, show: Callable[[Any], str]) -> None:
        table.add_row(text, *(show(run[key]) if key in run else "" for run in runs))

    add("peak learning rate", "learning_rate", lambda x: f"{x:g}")
    add("trained weights, M", "trained_parameters", lambda x: f"{x / 1e6:.2f}")
    add("optimizer state, MiB", "optimizer_bytes", lambda x: f"{x / 2**20:.2f}")
    add("training, min", "seconds", lambda x: f"{x / 60:.1f}")
    add("best epoch", "best_epoch", lambda x: f"{x:g}")
    add("loss", "test", lambda x: f"{x['loss']:.3f}")
    for name, text in _SHARES.items():
        add(f"{text}, %", "test", lambda x, name=name: f"{100 * x['metrics'][name]:.1f}")
    add("latency of a plan, s", "test", lambda x: _seconds(x["seconds_per_plan"]))
    return table


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
