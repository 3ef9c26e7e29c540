"""Validation curves of the same runs before and after a change of the code."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import matplotlib.ticker

from benchmarks.common.result_files import read_results
from benchmarks.pretraining.run_spec import ROOT


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """Draw the curves of one method in two suites over each other, a panel for each text."""

    before: str
    """Suite of the runs before the change."""
    after: str = "main"
    """Suite of the runs after it."""
    method: str = "natural-galore"
    """Method, with other arguments after an @ where wanted."""
    root: Path = ROOT
    """Directory of all results."""
    output: Path = Path("docs/figures/quality-overlay.png")
    """The picture."""


def draw_overlay(overlay: Overlay) -> Path:
    """Writes the picture and returns where it is.

    Raises:
      ConfigError: if a suite has no results.
    """
    curves = defaultdict(list)
    styles = ((overlay.before, "black", "--"), (overlay.after, "tab:red", "-"))
    for suite, color, linestyle in styles:
        for record in read_results(overlay.root, suite):
            if record["method"] == overlay.method:
                style = {"color": color, "linestyle": linestyle, "label": suite}
                curves[record["preset"], record["corpus"]].append((record["validation"], style))
    figure = matplotlib.figure.Figure(figsize=(6.5 * len(curves), 4.5), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False).ravel()
    for axes, (group, runs) in zip(panels, sorted(curves.items()), strict=True):
        for points, style in runs:
            steps, _, losses, _ = zip(*points, strict=True)
            axes.plot(steps, losses, linewidth=1.0, alpha=0.8, **style)
        axes.set(title=", ".join(group), xlabel="step", ylabel="validation loss, nats per token")
        axes.grid(alpha=0.2)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8))
        by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(by_label.values(), by_label.keys())
    overlay.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(overlay.output, dpi=120)
    return overlay.output
