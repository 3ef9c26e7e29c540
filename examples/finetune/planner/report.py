"""Descriptions of records and summaries for the terminal."""

import math
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Group
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


def summary_table(summary: dict[str, Any]) -> Group:
    """The methods side by side, tested after their best epoch, in 80 columns."""
    scores = _table(
        f"{summary['dataset']}, {summary['model']}: test split, %", (*_SHARES.values(), "loss")
    )
    costs = _table(
        "costs", ("peak rate", "trained, M", "state, MiB", "training, min", "best epoch", "plan, s")
    )
    for run in (summary["untrained"], *summary["methods"]):
        method, test = run.get("method", "untrained"), run["test"]
        shares = [f"{100 * test['metrics'][name]:.1f}" for name in _SHARES]
        scores.add_row(method, *shares, f"{test['loss']:.3f}")
        trained = [""] * 5
        if run is not summary["untrained"]:
            trained = [
                f"{run['learning_rate']:g}",
                f"{run['trained_parameters'] / 1e6:.2f}",
                f"{run['optimizer_bytes'] / 2**20:.2f}",
                f"{run['seconds'] / 60:.1f}",
                f"{run['best_epoch']:g}",
            ]
        costs.add_row(method, *trained, _seconds(test["seconds_per_plan"]))
    return Group(scores, costs)


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for text in columns:
        table.add_column(text.replace(" ", "\n"), justify="right")
    return table


def _seconds(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.1f}"
