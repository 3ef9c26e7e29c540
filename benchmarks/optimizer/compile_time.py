"""Time that the first update takes to trace and to compile, beside optax.contrib.galore's.

``python -m benchmarks.optimizer.compile_time`` makes optimizers for many unstacked matrices, equal
ones, of several shapes, or large ones, and measures the processor time of tracing (to StableHLO)
and of compiling, and the equations of the jaxpr, those of inner functions counted at every call.
Every measurement is a process of its own, without a compilation cache.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng
from benchmarks.common.child import call
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, print_targets, target, write_results

RANK = 4
SHAPES = {
    "equal": [(32, 48)],
    "seven shapes": [(32, 32), (32, 48), (48, 32), (32, 64), (64, 32), (48, 48), (24, 40)],
    # The matrices of a layer, too large for stacks.
    "large": [(512, 1024), *2 * [(512, 512)], (1024, 512), *2 * [(512, 1408)], (1408, 512)],
}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "optax.contrib.galore": lambda: optax.contrib.galore(1e-3, rank=RANK),
    "galore_adamw": lambda: ng.galore_adamw(1e-3, rank=RANK),
    "natural_galore_adamw": lambda: ng.natural_galore_adamw(1e-3, rank=RANK),
    "lean_natural_galore_adamw": lambda: ng.lean_natural_galore_adamw(1e-3, rank=RANK),
    "racs_adamw": lambda: ng.contrib.racs_adamw(1e-3),
    "apollo_adamw": lambda: ng.contrib.apollo_adamw(1e-3, rank=RANK),
    "ldadamw": lambda: ng.contrib.ldadamw(1e-3, rank=RANK),
    "alice_adamw": lambda: ng.contrib.alice_adamw(1e-3, rank=RANK),
}


def main(
    matrices: tuple[int, ...] = (10, 40, 200),
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS),
    output: Path = RESULTS / "compile_time.json",
    shapes: tuple[str, ...] = ("equal", "seven shapes"),
) -> dict[str, Any]:
    """Measure tracing and compiling.

    Args:
      matrices: how many.
      optimizers: of ``OPTIMIZERS``.
      output: where the results go.
      shapes: of ``SHAPES``.
    """
    results: dict[str, Any] = {"environment": environment(0), "rank": RANK, "runs": []}
    for kind in shapes:
        for number in matrices:
            for optimizer in optimizers:
                run = call(
                    "benchmarks.optimizer.compile_time:measure",
                    optimizer=optimizer,
                    number=number,
                    shapes=kind,
                )
                results["runs"].append(run)
                print(
                    f"{kind:12} {number:5} {optimizer:22} trace {run['trace_s']:6.2f}  compile "
                    f"{run['compile_s']:7.2f}  equations {run['equations']:7}",
                    flush=True,
                )
    results["targets"] = list(_targets(results["runs"]))
    print_targets(results["targets"])
    write_results(results, output)
    return results


def measure(optimizer: str, number: int, shapes: str) -> dict[str, Any]:
    """Processor seconds and equations of one update."""
    kinds = SHAPES[shapes]
    params = {f"{i}": jnp.zeros(kinds[i % len(kinds)]) for i in range(number)}
    tx = OPTIMIZERS[optimizer]()
    state = tx.init(params)
    start = time.process_time()
    traced = jax.jit(tx.update).trace(params, state, params)
    lowered = traced.lower()
    between = time.process_time()
    lowered.compile()
    end = time.process_time()
    return {
        "optimizer": optimizer,
        "matrices": number,
        "shapes": shapes,
        "trace_s": between - start,
        "compile_s": end - between,
        "equations": equations(traced.jaxpr.jaxpr),
    }


def equations(jaxpr: Any) -> int:
    """Equations of a jaxpr, those of inner ones counted at every call."""
    values = [list(eqn.params.values()) for eqn in jaxpr.eqns]
    inner = jax.tree.leaves(values, is_leaf=lambda x: hasattr(x, "jaxpr"))
    return len(jaxpr.eqns) + sum(equations(x.jaxpr) for x in inner if hasattr(x, "jaxpr"))


def _targets(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    found = {r["optimizer"]: r for r in runs if (r["matrices"], r["shapes"]) == (200, "equal")}
    seconds = {name: r["trace_s"] + r["compile_s"] for name, r in found.items()}
    peer = "optax.contrib.galore"
    for optimizer in ("galore_adamw", "natural_galore_adamw"):
        if {optimizer, peer} <= found.keys():
            name = f"{optimizer}, 200 equal matrices"
            yield target(f"{name}, to {peer}", seconds[optimizer] / seconds[peer], 2.0)
            yield target(f"{name}, equations", found[optimizer]["equations"], 10_000)


if __name__ == "__main__":
    run_from_command_line(main)
