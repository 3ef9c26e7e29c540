"""Memory of a training step by part, for the models of the GaLore papers, as numbers and a figure.

``python -m benchmarks.memory.breakdown`` writes ``benchmarks/results/memory_breakdown.json`` and
``docs/figures/memory-breakdown.png``. bfloat16, one row of 256 tokens, as in figure 1 of the paper.
Weights, gradients and optimizer states come from shapes; activations are an estimate from compiled
steps. No model is allocated.
"""

import os
from pathlib import Path
from typing import Any

import tyro

from examples.llama.memory.xla_flags import MEMORY_FLAGS

if __name__ == "__main__":  # Before jax starts.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {MEMORY_FLAGS}".strip()

from benchmarks.common.environment import RESULTS, environment, write
from examples.llama.memory.figure import PAPER_SIZES, breakdown, draw

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "memory-breakdown.png"


def main(
    sizes: tuple[str, ...] = PAPER_SIZES,
    tokens: int = 256,
    output: Path = RESULTS / "memory_breakdown.json",
    figure: Path = FIGURE,
) -> dict[str, Any]:
    """Break the memory of a step down into its parts.

    Args:
      sizes: presets of ``examples.llama``.
      tokens: in the one row of a batch.
      output: where the numbers go.
      figure: where the figure goes.
    """
    bars = breakdown(sizes, lambda text: print(text, flush=True), tokens)
    for bar in bars:
        step = "per layer" if bar.per_layer else "ordinary"
        parts = "".join(f"{value / 1e9:9.3f}" for value in bar.parts.values())
        print(f"{bar.size:6}{bar.method:22}{step:10}{parts}{bar.total / 1e9:9.3f} GB")
    results = {
        "environment": environment(seed=0),
        "tokens": tokens,
        "dtype": "bfloat16",
        "exact": ["weights", "gradients", "optimizer"],
        "estimated": ["activations"],
        "not counted": ["working memory of the update"],
        "bars": [{**bar._asdict(), "total": bar.total} for bar in bars],
    }
    write(results, output)
    draw(bars, figure, limit=24 * 10**9)
    return results


if __name__ == "__main__":
    tyro.cli(main)
