"""Memory of a training step with all gradients at once, and layer by layer.

``python -m benchmarks.memory.per_layer`` compiles the training step of ``examples/llama`` for a
model of stacked layers with and without ``--per-layer``, and for a model with unstacked layers a
step that does not measure the norm of the gradient, and prints what XLA reserves for temporary
arrays: gradients, updates, activations. Layers are recomputed in the backward pass in all of them.
Each is compiled in a process of its own, with XLA's own settings for CPUs and with those that
prefer memory to concurrency (``FLAGS``).
"""

import os
from pathlib import Path
from typing import Any

from benchmarks.common.child import call
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, write_results
from examples.llama.memory.xla_flags import MEMORY_FLAGS
from examples.llama.model.config import PresetName

FLAGS = {"default": "", "memory": MEMORY_FLAGS}
MIB = 2**20


def main(
    preset: PresetName = "60m",
    layers: int = 16,
    vocab_size: int = 1024,
    batch_size: int = 4,
    seq_len: int = 128,
    rank: int = 128,
    optimizers: tuple[str, ...] = ("adamw", "galore", "natural-galore"),
    eight_bits: tuple[str, ...] = (),
    unstacked: tuple[str, ...] = ("adamw",),
    timed: str = "natural-galore",
    steps: int = 2,
    output: Path = RESULTS / "per_layer.json",
) -> dict[str, Any]:
    """Measure the temporary memory of training steps.

    Args:
      preset: the width of the model, in float32.
      layers: as many layers of it.
      vocab_size: tokens.
      batch_size: rows.
      seq_len: tokens in a row.
      rank: of the subspaces.
      optimizers: names of ``examples.llama``, for stacked layers.
      eight_bits: the same, with updates per layer of weights in 8 bits, as moments and bases.
      unstacked: the same, for unstacked ones; with a subspace that takes minutes to compile.
      timed: the optimizer whose steps are also timed, with the settings that prefer memory.
      steps: how many.
      output: where the results go.
    """
    sizes = {
        "layers": layers,
        "vocab_size": vocab_size,
        "batch_size": batch_size,
        "seq_len": seq_len,
    }
    cases = [(name, route) for name in optimizers for route in ("ordinary", "per layer")]
    cases += [(name, "per layer, 8 bits") for name in eight_bits]
    cases += [(name, "unstacked") for name in unstacked]
    rows = []
    for optimizer, route in cases:
        for flags, value in FLAGS.items():
            row = call(
                "benchmarks.memory.step_bytes:step_bytes",
                env=os.environ | {"XLA_FLAGS": value},  # Read when a process starts.
                route=route,
                optimizer=optimizer,
                rank=rank,
                preset=preset,
                sizes=sizes,
                steps=steps if optimizer == timed and flags == "memory" else 0,
            )
            rows.append({"optimizer": optimizer, "route": route, "flags": flags, **row})
            print(_line(rows[-1]), flush=True)
    results = {
        "environment": environment(seed=0),
        "model": {"preset": preset, **sizes, "rank": rank},
        "flags": FLAGS,
        "steps": rows,
    }
    write_results(results, output)
    return results


def _line(row: dict[str, Any]) -> str:
    seconds = "".join(f" {s:6.2f} s" for s in row["step_s"])
    return (
        f"{row['optimizer']:16}{row['route']:18}{row['flags']:9}"
        f"temporary {row['temporary_bytes'] / MIB:7.1f} MiB   "
        f"in place {row['in_place_bytes'] / MIB:7.1f} of {row['state_bytes'] / MIB:7.1f}   "
        f"gradient of the layers {row['layer_gradient_bytes'] / MIB:7.1f}{seconds}"
    )


if __name__ == "__main__":
    run_from_command_line(main)
