"""Curves of a run as a picture."""

from pathlib import Path

import matplotlib.figure

from examples.common.metrics import Record, of_kind


def plot_curves(records: list[Record], path: Path, baselines: dict[str, float], title: str) -> None:
    """Draws training and validation perplexity over tokens into the PNG file `path`.

    `baselines` are perplexities of simpler models, drawn as horizontal lines.
    """
    # A Figure of its own, not pyplot: nothing global, no window system.
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    train, validation = of_kind(records, "train"), of_kind(records, "validation")
    axes.plot(*_curve(train), color="tab:blue", alpha=0.5, linewidth=1, label="training batch")
    axes.plot(*_curve(validation), "o-", color="tab:orange", markersize=4, label="validation")
    for style, (name, value) in zip((":", "--", "-."), baselines.items(), strict=False):
        axes.axhline(
            value, color="gray", linestyle=style, linewidth=1, label=f"{name}: {value:.0f}"
        )
    axes.set(xlabel="tokens", ylabel="perplexity", yscale="log", title=title)
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=150)


def _curve(records: list[Record]) -> tuple[list[int], list[float]]:
    return [r["tokens"] for r in records], [r["perplexity"] for r in records]
