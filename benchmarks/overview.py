"""The picture of the README: loss and memory beside AdamW's, from committed results.

``python -m benchmarks.overview`` draws docs/figures/overview.png from ``results/quality/main``
(test loss and bytes of state of each method at nano, on presidential addresses) and
``results/gpu_memory_a100_256_tokens.json`` (a whole step of LLaMA 7B, compiled for an A100).
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS
from benchmarks.common.result_files import read_results
from benchmarks.pretraining.summary import REFERENCE, Row, summarise
from benchmarks.pretraining.tables import CORE, label
from examples.common.figures import GREYS, PAGE, in_style

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "overview.png"
OURS = ("natural-galore-lean", "natural-galore")
GPU_GB = 24
# The methods of the tables, with the clipping of the default where it was tried.
SHOWN = [m for m in CORE if m not in ("fira", "racs", "scale")]
SHOWN += ["fira-clipped", "racs-clipped", "scale-clipped"]
# Places of names, in points from the method's mark, where the usual place is taken.
OFFSETS = {
    "adamw-clipped": (-14, 9),
    "fira-clipped": (-12, -20),
    "galore": (-46, -4),
    "racs-clipped": (-40, 9),
    "scale-clipped": (-14, -18),
}
LEAN = "lean-natural-galore@rank=16"
BARS = (
    ("AdamW", "adamw", "ordinary"),
    ("AdamW, per layer", "adamw", "per layer"),
    ("default, per layer", "natural-galore", "per layer"),
    ("lean, per layer", LEAN, "per layer"),
    ("lean, 8-bit weights", f"{LEAN},weight_bits=8", "per layer"),
)
# What a step consists of beside the optimizer's state, which each method has other parts of.
PARTS = {
    "weights": ("weights",),
    "gradients": ("gradients",),
    "activations and update": ("activations and update", "batch"),
}


@in_style
def main(output: Path = FIGURE) -> None:
    """Draw the picture.

    Args:
      output: where it goes.
    """
    figure = matplotlib.figure.Figure(figsize=(PAGE, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.05, 1))
    frontier(left)
    bars(right)
    figure.savefig(output)
    print(f"written to {output.name}")


def frontier(axes: Any) -> None:
    """Test loss of each method over its bytes of state."""
    rows = summarise(read_results(RESULTS / "quality", "main"))["nano", "sotu"].values()
    by_method = {row.method: row for row in rows if row.method in SHOWN and not row.diverged}
    full = by_method[REFERENCE].state_bytes
    for method, row in by_method.items():
        ours = method in OURS
        style = {"fmt": "s" if ours else "o", "color": "tab:red" if ours else "0.25"}
        at = _at(row, full)
        axes.errorbar(*at, yerr=row.test_std or 0, markersize=5, capsize=2, **style)
        axes.annotate(
            label(method).removeprefix("Natural GaLore, "),
            at,
            OFFSETS.get(method, (6, 3)),
            textcoords="offset points",
            color=style["color"],
        )
    axes.plot(*zip(*(_at(by_method[m], full) for m in OURS), strict=True), color="tab:red")
    axes.set(xlabel="optimizer state, % of AdamW's", ylabel="test loss, nats per token")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set_xticks([5, 10, 20, 50, 100])
    axes.minorticks_off()
    axes.set_xlim(4, 900)  # room for the names
    axes.set_title("LLaMA of 1.07 M parameters, tuned rates")


def _at(row: Row, full: int) -> tuple[float, float]:
    """Percent of AdamW's bytes, ``full``, and loss."""
    return 100 * row.state_bytes / full, row.test


def bars(axes: Any) -> None:
    """Memory of a step of LLaMA 7B by part."""
    for y, (_, method, step) in enumerate(BARS):
        start = 0.0
        for number, (part, size) in enumerate(memory(method, step).items()):
            shade = (*GREYS[:3], "tab:red")[number]
            hatch = "//" if number == len(PARTS) else None  # Red is a grey in print.
            axes.barh(
                y,
                size,
                left=start,
                color=shade,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
                label=part if y == 0 else None,
            )
            start += size
        beside = GPU_GB if start < GPU_GB else start  # Not across the dashed line.
        axes.text(beside + 0.7, y, f"{start:.1f} GB", va="center")
    axes.set_yticks(range(len(BARS)), [name.replace(", ", ",\n") for name, _, _ in BARS])
    axes.grid(visible=False)
    axes.set(xlabel="GB, compiled for an A100", xlim=(0, 70))
    axes.set_title("A training step of LLaMA 7B, bfloat16")
    axes.axvline(GPU_GB, color="black", linewidth=1, linestyle="--")
    axes.set_ylim(len(BARS) - 0.1, -0.6)
    axes.text(GPU_GB + 0.7, len(BARS) - 0.3, f"a GPU of {GPU_GB} GB", va="center")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.16), ncols=2, columnspacing=1)


def memory(method: str, step: str) -> dict[str, float]:
    """GB of a step on 256 tokens, by part."""
    steps = json.loads((RESULTS / "gpu_memory_a100_256_tokens.json").read_text())["steps"]
    (found,) = (
        s["compiled_for_a100_bytes"] for s in steps if (s["method"], s["step"]) == (method, step)
    )
    parts = {part: sum(found[name] for name in names) / 1e9 for part, names in PARTS.items()}
    return {**parts, "optimizer state": found["total"] / 1e9 - sum(parts.values())}


if __name__ == "__main__":
    run_from_command_line(main)
