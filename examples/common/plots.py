"""Curves of runs as PNG files."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from examples.common.figures import COLOURS, PAGE, in_style
from examples.common.metrics import Record, of_kind

# Figures of their own instead of pyplot: nothing global, no window system.


@in_style
def plot_run(records: list[Record], path: Path, baselines: dict[str, float], title: str) -> None:
    """Draw training and validation perplexity over tokens.

    `baselines` are perplexities of simpler models, drawn as horizontal lines.
    """
    figure = Figure(figsize=(PAGE, 4.8), layout="constrained")
    axes = figure.subplots()
    train, validation = of_kind(records, "train"), of_kind(records, "validation")
    tokens, values = "tokens", "perplexity"
    faint = {"color": "0.6", "linestyle": "-", "linewidth": 1}
    axes.plot(*_columns(train, tokens, values), **faint, label="training batch")
    dots = {"color": "tab:red", "markersize": 4}
    axes.plot(*_columns(validation, tokens, values), "o-", **dots, label="validation")
    for style, (name, value) in zip((":", "--", "-."), baselines.items(), strict=False):
        label = f"{name}: {value:.0f}"
        axes.axhline(value, color="gray", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="tokens", ylabel="perplexity", yscale="log", title=title)
    axes.grid(which="both")
    axes.legend()
    figure.savefig(path)


@in_style
def plot_methods(records: Mapping[str, list[Record]], path: Path, title: str) -> None:
    """Draw losses, and success rates with and without arguments, over epochs."""
    figure = Figure(figsize=(PAGE, 4.5), layout="constrained")
    losses, rates = figure.subplots(1, 2)
    for i, (method, found) in enumerate(records.items()):
        color, marker = COLOURS[i % len(COLOURS)], "osv^Dx"[i % 6]
        train, validation = of_kind(found, "train"), of_kind(found, "validation")
        faint = {"color": color, "alpha": 0.3, "linewidth": 1, "linestyle": "-"}
        losses.plot(*_columns(train, "epoch", "loss"), **faint)
        epochs, values = _columns(validation, "epoch", "loss")
        losses.plot(epochs, values, f"{marker}-", color=color, label=method)
        for name, style in (("success", f"{marker}-"), ("aware_success", f"{marker}:")):
            values = [100 * record["metrics"][name] for record in validation]
            label = f"{method}, {name.replace('_', ' ')}"
            rates.plot(epochs, values, style, color=color, label=label)
    losses.set(xlabel="epoch", ylabel="nats a token: steps (faint), validation")
    rates.set(xlabel="epoch", ylabel="validation plans, %", ylim=(-3, 103))
    for axes in (losses, rates):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.suptitle(title)
    figure.savefig(path)


def _columns(records: list[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    return [record[x] for record in records], [record[y] for record in records]
