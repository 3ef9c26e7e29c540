"""Time of an update in which small equal matrices are one stack, beside one by one.

``python -m benchmarks.optimizer.stacks`` runs both programs in turns, in one process.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import natgalore_jax as ng
from benchmarks.common.environment import RESULTS, environment, write_results
from natgalore_jax._src.kernels import stacks

# Rows, columns, matrices, rank.
SIZES = ((32, 48, 200, 4), (128, 344, 32, 32), (256, 688, 16, 64), (512, 512, 32, 128))
OPTIMIZERS = {
    "galore_adamw": ng.galore_adamw,
    "natural_galore_adamw": ng.natural_galore_adamw,
    "lean_natural_galore_adamw": ng.lean_natural_galore_adamw,
}


def main(
    sizes: tuple[tuple[int, int, int, int], ...] = SIZES,
    steps: int = 40,
    seed: int = 0,
    output: Path = RESULTS / "stacks.json",
) -> dict[str, Any]:
    """Measure the median time of both programs.

    Args:
      sizes: rows, columns, matrices and rank of each measurement.
      steps: of each program, after three that are not counted.
      seed: of parameters and gradients.
      output: where the results go.
    """
    results: dict[str, Any] = {"environment": environment(seed), "steps": steps, "runs": []}
    for name in OPTIMIZERS:
        for rows, columns, number, rank in sizes:
            run = measure(name, rows, columns, number, rank, steps, seed)
            results["runs"].append(run)
            print(
                f"{name:26} {number:4} of {rows} x {columns}, rank {rank:3}: one by one "
                f"{1e3 * run['one_by_one_s']:6.2f} ms, stacked {1e3 * run['stacked_s']:6.2f}, "
                f"ratio {run['stacked_s'] / run['one_by_one_s']:.2f}",
                flush=True,
            )
    write_results(results, output)
    return results


def measure(
    name: str, rows: int, columns: int, number: int, rank: int, steps: int, seed: int
) -> dict[str, Any]:
    """Median seconds of an update of equal matrices, with its addition to the parameters."""
    keys = iter(jax.random.split(jax.random.key(seed), 2 * number))
    params, grads = (
        {f"{i}": jax.random.normal(next(keys), (rows, columns)) for i in range(number)}
        for _ in range(2)
    )
    tx = OPTIMIZERS[name](1e-3, rank=rank)

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    most = stacks.MAX_BYTES
    try:
        stacks.MAX_BYTES = 0
        one_by_one = _Program(step, params, tx.init(params))
    finally:
        stacks.MAX_BYTES = most
    stacked = _Program(step, params, tx.init(params))
    for _ in range(3 + steps):
        one_by_one.run()
        stacked.run()
    return {
        "optimizer": name,
        "shape": [rows, columns],
        "matrices": number,
        "rank": rank,
        "one_by_one_s": statistics.median(one_by_one.times[3:]),
        "stacked_s": statistics.median(stacked.times[3:]),
    }


class _Program:
    """A compiled step, what it works on, and the seconds of its runs."""

    def __init__(self, step: Callable[..., Any], params: Any, state: Any) -> None:
        own = jax.tree.map(jnp.copy, params), state
        # A function of its own, because JAX keeps the trace of a function.
        self._step = jax.jit(lambda *own: step(*own), donate_argnums=(0, 1)).lower(*own).compile()
        self._own, self.times = own, []

    def run(self) -> None:
        start = time.perf_counter()
        self._own = jax.block_until_ready(self._step(*self._own))
        self.times.append(time.perf_counter() - start)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
