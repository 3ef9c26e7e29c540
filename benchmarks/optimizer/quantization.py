"""State in few bits: how fast, how much memory.

``python -m benchmarks.optimizer.quantization`` measures time, state and temporary memory of the
update for the hidden matrices of a LLaMA preset, as in ``benchmarks.optimizer.step_time``, with
moments in eight bits, with bases and with a history of ten gradients in eight and in four, and the
floor: what the machine takes for the bytes that must move (gradient and state read, update and
moments written) and for the products of the projection, both measured in between. Processor
seconds are those of all threads together: unlike wall time they hardly change when other programs
run.
"""

from pathlib import Path
from statistics import median
from typing import Any

import jax
import optax

import natgalore_jax as ng
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, print_targets, target, write_results
from benchmarks.common.shapes import hidden_shapes, matrices, random_tree
from benchmarks.common.timing import Updater
from benchmarks.optimizer.floor import Machine, floor_seconds, operations
from examples.llama.memory.step_memory import temporary_bytes
from examples.llama.model.config import PresetName

HISTORY = 10  # gradients


def main(
    preset: PresetName = "60m",
    layers: int | None = None,
    rank: int = 128,
    rounds: int = 12,
    seed: int = 0,
    output: Path = RESULTS / "quantization.json",
) -> dict[str, Any]:
    """Measure time and memory of state in few bits.

    Args:
      preset: the model whose hidden matrices are updated.
      layers: as many of its layers; by default all.
      rank: of the subspaces of galore_adamw.
      rounds: updates timed, the first two not counted.
      seed: of gradients and parameters.
      output: where the results go.
    """
    where_and_how = environment(seed)
    cost = _cost(preset, layers, rank, rounds, seed)
    results = {
        "environment": where_and_how,
        "settings": {"preset": preset, "layers": layers, "rank": rank, "rounds": rounds},
        "cost": cost,
        "targets": [
            target(f"{name}, processor time / float32", cost[name]["processor_to_float32"], 1.5)
            for name in ("adam, 8 bits", "galore, 8 bits")
        ],
    }
    _print(results)
    write_results(results, output)
    return results


def _cost(preset: str, layers: int | None, rank: int, rounds: int, seed: int) -> dict[str, Any]:
    shapes, key = hidden_shapes(preset, layers), jax.random.key(seed)
    params, grads = random_tree(shapes, key, 0.02), random_tree(shapes, key, 1e-3)

    # No refresh among the steps that are timed: that of the first does not count.
    def galore(**options):
        return ng.galore_adamw(1e-2, rank=rank, update_interval=10**6, **options)

    def history(dtype=None):
        stored = ng.natural_galore(
            rank, update_interval=10**6, history=HISTORY, history_dtype=dtype
        )
        return ng.chain(stored, optax.adamw(1e-2))

    optimizers = {
        "adam": optax.scale_by_adam(),
        "adam, 8 bits": ng.scale_by_adam_8bit(),
        "adam, wrapped": ng.quantize_state(optax.scale_by_adam()),
        "galore": galore(),
        "galore, 8 bits": galore(moment_bits=8),
        "galore, int8 basis": galore(basis_dtype="int8"),
        "galore, int4 basis": galore(basis_dtype="int4"),
        "history": history(),
        "history, int8": history("int8"),
        "history, int4": history("int4"),
    }
    sides = matrices(shapes)
    machine = Machine(sides, rank)
    gradient_bytes = sum(x.nbytes for x in jax.tree.leaves(grads))
    updaters = {name: Updater(tx, grads, params) for name, tx in optimizers.items()}
    rows: dict[str, dict[str, Any]] = {
        name: {
            "state_bytes": sum(x.nbytes for x in jax.tree.leaves(updater.state)),
            "moved_bytes": 2 * gradient_bytes + _read_and_written(optimizers[name], params),
            "temporary_bytes": temporary_bytes(updater.compiled),
            "wall_samples_s": updater.samples,
            "processor_samples_s": updater.processor_samples,
        }
        for name, updater in updaters.items()
    }
    for _ in range(rounds):
        machine.sample()
        for updater in updaters.values():
            updater.step(grads, params)
    speed = machine.figures()
    for name, row in rows.items():
        base = rows[name.split(",")[0]]
        for kind in ("wall", "processor"):
            row[f"{kind}_s"] = median(row[f"{kind}_samples_s"][2:])
            row[f"{kind}_to_float32"] = row[f"{kind}_s"] / base[f"{kind}_s"]
        row["floor_s"] = floor_seconds(
            row["moved_bytes"],
            0 if name.startswith("adam") else operations("galore", sides, rank),
            speed["copy_bytes_per_s"],
            speed["product_operations_per_s"],
        )
    return rows


def _read_and_written(tx: optax.GradientTransformation, params: Any) -> int:
    """Bytes of the state, twice; once for bases, which change at refreshes only, and for all but
    one column of the history."""
    report = ng.memory_report(tx, params)
    once = report.part_bytes["basis"] + report.part_bytes["history"] * (HISTORY - 1) // HISTORY
    return 2 * report.total_state_bytes - once


def _print(results: dict[str, Any]) -> None:
    print(f"\nThe update of {results['settings']['preset']}")
    columns = ("cpu ms", "/ float32", "wall ms", "/ float32", "/ floor", "state MB", "temp. MB")
    print(f"  {'':18}" + "".join(f"{c:>11}" for c in columns))
    for name, row in results["cost"].items():
        figures = (
            1e3 * row["processor_s"],
            row["processor_to_float32"],
            1e3 * row["wall_s"],
            row["wall_to_float32"],
            row["wall_s"] / row["floor_s"],
            row["state_bytes"] / 1e6,
            row["temporary_bytes"] / 1e6,
        )
        print(f"  {name:18}" + "".join(f"{x:11.2f}" for x in figures))
    print_targets(results["targets"])


if __name__ == "__main__":
    run_from_command_line(main)
