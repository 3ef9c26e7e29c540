"""The memory of the models of the GaLore papers by part, as a figure."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.common.optimizers import OptimizerConfig
from examples.llama.memory.sizes import unit_of
from examples.llama.memory.step_memory import lower_bound
from examples.llama.run_config import RunConfig, run_preset
from examples.llama.training.build import abstract_run

PAPER_SIZES = ("60m", "130m", "350m", "1b", "7b")
# Label: arguments of the optimizer, and whether updates are per layer.
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "AdamW": ({"name": "adamw"}, False),
    "8-bit Adam": ({"name": "adamw-8bit"}, False),
    "GaLore": ({"name": "galore"}, True),
    "8-bit GaLore": ({"name": "galore", "moment_bits": 8}, True),
    "Natural GaLore": ({"name": "natural-galore"}, True),
    "8-bit Natural GaLore": ({"name": "natural-galore", "moment_bits": 8}, True),
}
# Parts of the figure, from below: the parts of `StepMemory` that each sums up, and its colour.
STACK: dict[str, tuple[tuple[str, ...], str]] = {
    "weights": (("weights",), "#4c72b0"),
    "gradients": (("gradients",), "#c44e52"),
    "optimizer: moments": (("inner", "other", "shared"), "#dd8452"),
    "optimizer: basis": (("basis",), "#55a868"),
    "optimizer: Fisher": (("history",), "#8172b3"),
    "activations": (("activations",), "#937860"),
}


class Bar(NamedTuple):
    """One model with one optimizer."""

    size: str
    method: str
    rank: int
    per_layer: bool
    parts: dict[str, int]  # bytes, by the names of `STACK`

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def breakdown(
    sizes: Sequence[str],
    progress: Callable[[str], None] = lambda text: None,
    tokens: int = 256,
) -> list[Bar]:
    """Every method at every size: bfloat16, one row of `tokens` tokens, nothing recomputed but
    what updates per layer recompute. As in the papers' figure, the working memory of the update is
    not counted; that of activations is an estimate, all else comes from shapes."""
    bars = []
    for size in sizes:
        for method, (arguments, per_layer) in METHODS.items():
            for each in sorted({False, per_layer}):
                memory = lower_bound(abstract_run(_config(size, arguments, each, tokens)))
                parts = {
                    label: sum(memory.parts.get(name, 0) for name in names)
                    for label, (names, _) in STACK.items()
                }
                rank = run_preset(size).optimizer.rank
                bars.append(Bar(size, method, rank, each, parts))
        progress(f"{size}: {bars[-1].total / 1e9:.2f} GB with {bars[-1].method}")
    return bars


def draw(bars: Sequence[Bar], path: Path, limit: int | None = None) -> None:
    """One panel a size: methods as in `METHODS`, the low-rank ones updated per layer.

    Args:
      bars: of :func:`breakdown`.
      path: where the figure goes.
      limit: bytes at which a line is drawn, in the panels that reach half of it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [bar for bar in bars if bar.per_layer == METHODS[bar.method][1]]
    sizes = list(dict.fromkeys(bar.size for bar in shown))
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(2.2 + 2.3 * len(sizes), 4.2), squeeze=False, layout="constrained"
    )
    for axis, size in zip(axes[0], sizes, strict=True):
        of_size = [bar for bar in shown if bar.size == size]
        unit, scale = unit_of(max(bar.total for bar in of_size))
        bottom = [0.0] * len(of_size)
        for label, (_, colour) in STACK.items():
            heights = [bar.parts[label] / scale for bar in of_size]
            axis.bar(range(len(of_size)), heights, 0.75, bottom, label=label, color=colour)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for x, height in enumerate(bottom):
            axis.annotate(f"{height:.3g}", (x, height), ha="center", va="bottom", fontsize=7)
        if limit is not None and 2 * max(bottom) * scale > limit:
            axis.axhline(limit / scale, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"{size}, rank {of_size[0].rank}", fontsize=9)
        axis.set_ylabel(unit, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xticks(
            range(len(of_size)), [bar.method for bar in of_size], rotation=60, ha="right"
        )
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "One row of tokens in bfloat16. GaLore and Natural GaLore: updates per layer. "
        "Without the working memory of the update.",
        fontsize=8,
    )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _config(size: str, optimizer: dict[str, Any], per_layer: bool, tokens: int) -> RunConfig:
    config = run_preset(size)
    model = dataclasses.replace(
        config.model, stacked=True, dtype="bfloat16", param_dtype="bfloat16"
    )
    return dataclasses.replace(
        config,
        model=model,
        batch_size=1,
        seq_len=tokens,
        per_layer=per_layer,
        optimizer=OptimizerConfig(rank=config.optimizer.rank, **optimizer),
    )
