"""The picture of the README: loss and memory beside AdamW's, from committed results.

``python -m benchmarks.overview`` draws docs/figures/overview.png from ``results/quality/tune`` (the
validation loss of the tuning runs at the best rates, one seed, presidential addresses, nano) and
``results/gpu_memory_estimates.json`` (a whole step of LLaMA 7B on 256 tokens, estimated).
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.figure
import tyro

from benchmarks.common.environment import RESULTS

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "overview.png"
# Method, its two tuned rates in file names, and colour.
CURVES = (
    ("adamw-one-rate", "lr0.003-x1", "lightgray"),
    ("adamw", "lr0.0025-x4", "black"),
    ("muon", "lr0.01-x2", "tab:brown"),
    ("fira", "lr0.005-x4", "tab:green"),
    ("natural-galore", "lr0.005-x4", "tab:red"),
)
BARS = (
    ("AdamW", "adamw", "ordinary"),
    ("Natural GaLore, per layer", "natural-galore", "per layer"),
    ("8-bit moments, 8-bit basis", "natural-galore@moment_bits=8,basis_dtype=int8", "per layer"),
)
# What a step consists of beside the optimizer's state, which each method has other parts of.
PARTS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "activations and update": ("activations", "update", "batch"),
}


def main(output: Path = FIGURE) -> None:
    """Draw the picture.

    Args:
      output: where it goes.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for method, rates, colour in CURVES:
        name, points = curve(method, rates)
        left.plot(*zip(*points, strict=True), color=colour, label=name)
    left.set(xlabel="step", ylabel="validation loss", ylim=(None, 5.2))
    left.set_title("1.07 M parameters, tuned rates, one seed", fontsize=9)
    left.legend(fontsize=8)
    left.grid(alpha=0.2)

    for y, (_, method, step) in enumerate(BARS):
        start = 0.0
        for number, (part, size) in enumerate(memory(method, step).items()):
            label = part if y == 0 else None
            right.barh(y, size, left=start, color=f"C{number}", label=label)
            start += size
        right.text(start + 0.5, y, f"{start:.1f} GB", va="center", fontsize=8)
    right.set_yticks(range(len(BARS)), [name for name, _, _ in BARS], fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="GB, estimated", xlim=(0, 68))
    right.set_title("A training step of LLaMA 7B, bfloat16, rank 1024", fontsize=9)
    right.axvline(24, color="gray", linewidth=1, linestyle="--")
    right.legend(fontsize=7, loc="lower right")
    figure.savefig(output, dpi=120)
    print(f"written to {output.name}")


def curve(method: str, rates: str) -> tuple[str, list[tuple[int, float]]]:
    """The method's name, and its validation loss after each number of steps."""
    losses: dict[int, list[float]] = defaultdict(list)
    directory = RESULTS / "quality" / "tune" / "sotu-nano"
    runs = [_read(path) for path in sorted(directory.glob(f"{method}-{rates}-seed*.json"))]
    for run in runs:
        for step, _, loss, _ in run["validation"]:
            losses[step].append(loss)
    return runs[0]["label"], [(step, statistics.fmean(x)) for step, x in losses.items()]


def memory(method: str, step: str) -> dict[str, float]:
    """GB of a step on 256 tokens, by part."""
    steps = _read(RESULTS / "gpu_memory_estimates.json")["steps"]
    (found,) = (
        s["estimated_bytes"]
        for s in steps
        if (s["preset"], s["method"], s["step"], s["rows"]) == ("7b", method, step, 1)
    )
    parts = {part: sum(found[name] for name in names) / 1e9 for part, names in PARTS.items()}
    return {**parts, "optimizer state": found["total"] / 1e9 - sum(parts.values())}


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
