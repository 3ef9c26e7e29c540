"""Descriptions of records and summaries for the terminal."""

from typing import Any

from rich.console import Group
from rich.table import Table

from examples.common.metrics import Record


def summary_table(summary: dict[str, Any]) -> Group:
    """The methods side by side, for people, in 80 columns. Metrics are in percent."""
    metrics = summary["methods"][0]["metrics"]
    columns = [(split, name) for split, found in metrics.items() for name in found]
    scores = Table(title=f"{summary['task']}: scores, %")
    costs = Table(title="costs")
    for table in (scores, costs):
        table.add_column("", no_wrap=True)
    for split, name in columns:
        scores.add_column(f"{split}_{name}".replace("_", "\n"), justify="right")
    for text in ("peak rate", "trained, M", "state, MiB", "training, min"):
        costs.add_column(text.replace(" ", "\n"), justify="right")

    def values(metrics: dict[str, dict[str, float]]) -> list[str]:
        return [f"{100 * metrics[split][name]:.1f}" for split, name in columns]

    for run in summary["methods"]:
        scores.add_row(run["method"], *values(run["metrics"]))
        costs.add_row(
            run["method"],
            f"{run['learning_rate']:g}",
            f"{run['trained_parameters'] / 1e6:.2f}",
            f"{run['optimizer_bytes'] / 2**20:.2f}",
            f"{run['seconds'] / 60:.1f}",
        )
    if summary["baseline"] is not None:
        scores.add_row("tf-idf", *values(summary["baseline"]))
    # Not in the title, which is as narrow as the table: a path would be broken anywhere.
    return Group(f"{summary['task']}, {summary['model']}", scores, costs)


def describe(record: Record) -> str:
    """A record in a few words."""
    if record["kind"] == "train":
        return f"loss {record['loss']:.3f}"
    values = ", ".join(f"{name} {100 * value:.1f}" for name, value in record["metrics"].items())
    return f"{record['kind'].replace('_', ' ')} {values}"
