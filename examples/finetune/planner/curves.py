"""Curves of all methods as a picture."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.figure

from examples.common.metrics import Record, of_kind


def plot_curves(records: Mapping[str, list[Record]], path: Path, title: str) -> None:
    """Draws losses, and success rates with and without arguments, over epochs into a PNG file."""
    # A Figure of its own, not pyplot: nothing global, no window system.
    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    losses, rates = figure.subplots(1, 2)
    for i, (method, found) in enumerate(records.items()):
        color = f"C{i % 10}"
        train, validation = of_kind(found, "train"), of_kind(found, "validation")
        epochs = [record["epoch"] for record in validation]
        losses.plot(
            [record["epoch"] for record in train],
            [record["loss"] for record in train],
            color=color,
            alpha=0.3,
            linewidth=1,
        )
        losses.plot(
            epochs, [record["loss"] for record in validation], "o-", color=color, label=method
        )
        for name, style in (("success", "o-"), ("aware_success", "s:")):
            values = [100 * record["metrics"][name] for record in validation]
            label = f"{method}, {name.replace('_', ' ')}"
            rates.plot(epochs, values, style, color=color, label=label)
    losses.set(xlabel="epoch", ylabel="nats a token: steps (faint), validation")
    rates.set(xlabel="epoch", ylabel="validation plans, %", ylim=(-3, 103))
    for axes in (losses, rates):
        axes.grid(alpha=0.2)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
