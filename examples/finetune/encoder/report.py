"""Descriptions of records and summaries for the terminal."""

from typing import Any

from rich.table import Table

from examples.common.metrics import Record


def summary_table(summary: dict[str, Any]) -> Table:
    """The methods side by side, for people. Metrics are in percent."""
    table = Table(title=f"{summary['task']}, {summary['model']}")
    columns = [(split, name) for split, found in _metrics(summary).items() for name in found]
    table.add_column("", no_wrap=True)
    for text in ("rate", "trained M", "state MiB"):
        table.add_column(text, justify="right")
    for split, name in columns:
        table.add_column(f"{split} {name}".replace("_", " "), justify="right")
    table.add_column("min", justify="right")

    def values(metrics: dict[str, dict[str, float]]) -> list[str]:
        return [f"{100 * metrics[split][name]:.1f}" for split, name in columns]

    for run in summary["methods"]:
        table.add_row(
            run["method"],
            f"{run['learning_rate']:g}",
            f"{run['trained_parameters'] / 1e6:.2f}",
            f"{run['optimizer_bytes'] / 2**20:.2f}",
            *values(run["metrics"]),
            f"{run['seconds'] / 60:.1f}",
        )
    if summary["baseline"] is not None:
        table.add_row("tf-idf", "", "", "", *values(summary["baseline"]), "")
    return table


def _metrics(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    return summary["methods"][0]["metrics"]


def describe(record: Record) -> str:
    """A record in a few words."""
    if record["kind"] == "train":
        return f"loss {record['loss']:.3f}"
    values = ", ".join(f"{name} {100 * value:.1f}" for name, value in record["metrics"].items())
    return f"{record['kind'].replace('_', ' ')} {values}"
