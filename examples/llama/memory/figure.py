"""The memory of the models of the GaLore papers by part, as a figure."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from examples.common.figures import GREYS, PAGE, in_style
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
_ROOM = 1.25  # Width of a panel over its longest bar: for the numbers.
_OPTIMIZER = {"color": "tab:red", "edgecolor": "white", "linewidth": 0}
# Parts of the figure, from the left: the parts of `StepMemory` that each sums up, and its style.
STACK: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "weights": (("weights",), {"color": GREYS[0]}),
    "gradients": (("gradients",), {"color": GREYS[1]}),
    "optimizer: moments": (("inner", "other", "shared"), _OPTIMIZER | {"hatch": "//"}),
    "optimizer: basis": (("basis",), _OPTIMIZER | {"hatch": "....", "color": "tab:orange"}),
    "optimizer: Fisher": (("history",), {"color": "black"}),
    "activations": (("activations",), {"color": GREYS[3]}),
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
    not counted; that of activations is an estimate, all else comes from shapes.

    On a CPU the estimate depends on XLA's flags: call `add_flags(MEMORY_FLAGS)` of
    xla_flags.py before jax is imported for the numbers of `python -m examples.llama.plan`.
    """
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


@in_style
def draw(bars: Sequence[Bar], path: Path, limit: int | None = None) -> None:
    """One panel a size: methods as in `METHODS`, the low-rank ones updated per layer.

    Args:
      bars: of :func:`breakdown`.
      path: where the figure goes.
      limit: bytes at which a line is drawn, in the panels that it fits into.
    """
    shown = [bar for bar in bars if bar.per_layer == METHODS[bar.method][1]]
    sizes = list(dict.fromkeys(bar.size for bar in shown))
    columns = min(3, len(sizes) + 1)
    rows = -(-(len(sizes) + 1) // columns)  # The last panel has the legend.
    # A Figure of its own instead of pyplot: nothing global, no window system.
    figure = Figure(figsize=(PAGE, 0.4 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, (axis, size) in enumerate(zip(panels, sizes, strict=False)):
        _draw_panel(axis, [bar for bar in shown if bar.size == size], limit, number % columns == 0)
    for unused in panels[len(sizes) :]:
        unused.axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center")
    figure.suptitle(
        "One row of tokens in bfloat16. GaLore and Natural GaLore: updates per layer.\n"
        "Without the working memory of the update."
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(axis: Any, bars: Sequence[Bar], limit: int | None, has_names: bool) -> None:
    unit, scale = unit_of(max(bar.total for bar in bars))
    ends = [0.0] * len(bars)
    for label, (_, style) in STACK.items():
        widths = [bar.parts[label] / scale for bar in bars]
        axis.barh(range(len(bars)), widths, 0.75, ends, label=label, **style)
        ends = [a + b for a, b in zip(ends, widths, strict=True)]
    most = max(ends)
    line = limit / scale if limit is not None and limit < _ROOM * most * scale else None
    gap = 0.02 * most
    for y, end in enumerate(ends):
        # Not across the line.
        x = line if line is not None and line - 0.2 * most < end < line else end
        axis.text(x + gap, y, f"{end:.3g}", va="center")
    if line is not None:
        axis.axvline(line, color="black", linewidth=0.8, linestyle="--")
        axis.text(line + gap, len(bars) - 0.1, f"{line:.3g} {unit}", va="center")
    axis.set(title=f"{bars[0].size}, rank {bars[0].rank}", xlabel=unit, xlim=(0, _ROOM * most))
    axis.set_yticks(range(len(bars)), [bar.method if has_names else "" for bar in bars])
    axis.set_ylim(len(bars) - (0.4 if line is None else -0.4), -0.6)
    axis.grid(visible=False)
    axis.spines[["top", "right"]].set_visible(False)


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
