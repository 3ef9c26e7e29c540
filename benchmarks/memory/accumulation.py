"""Gradient accumulation in three ways: memory of the accumulator, time of a micro-batch.

``python -m benchmarks.memory.accumulation`` compares ``optax.MultiSteps`` around an optimizer,
whose accumulator has the size of the gradient; ``optax.MultiSteps`` inside its subspace, whose
accumulator is low-rank but which projects, updates and projects back for each micro-batch; and the
accumulation in the subspace of ``examples/llama``, with ``natgalore_jax.training.low_rank_steps``.

(a) Bytes of the accumulator for whole models, from shapes alone. (b) What taking one gradient costs
the optimizer, forward and backward pass not counted, for the hidden matrices of a few layers; all
three end with the parameters changed in place. Bases are not refreshed while it is measured. Times
are those of the processor, summed over its threads: they depend less on other programs.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import natgalore_jax as ng
from benchmarks.common.environment import RESULTS, environment, print_targets, target, write
from benchmarks.common.shapes import hidden_shapes, llama_shapes, random_tree
from benchmarks.common.timing import median
from examples.common.train_state import empty_accumulator
from examples.llama.run_config import run_preset
from examples.llama.training.train_step import accumulate_low_rank

PRESETS = ("60m", "130m", "350m", "1b", "7b")
RATE = 1e-3


def main(
    presets: tuple[str, ...] = PRESETS,
    preset: str = "60m",
    layers: int = 2,
    rank: int = 128,
    number: int = 4,
    rounds: int = 6,
    seed: int = 0,
    output: Path = RESULTS / "accumulation.json",
) -> dict[str, Any]:
    """Measure accumulators and the time of a micro-batch.

    Args:
      presets: the models of (a), at their own ranks, in bfloat16.
      preset: the model of (b), in float32.
      layers: as many of its layers, stacked.
      rank: of their subspaces.
      number: micro-batches in a step.
      rounds: steps of each way, the first not counted.
      seed: of parameters and gradients.
      output: where the results go.
    """
    where_and_how = environment(seed)
    memory = {name: accumulator_bytes(name) for name in presets}
    cost = accumulation_cost(preset, layers, rank, number, rounds, seed)
    ways = cost["ways"]
    ours = ways["subspace"]
    results = {
        "environment": where_and_how,
        "memory": memory,
        "cost": cost,
        "targets": [
            target(f"{what}, subspace / MultiSteps {other}", ours[key] / ways[other][key], 1.0)
            for what, key, other in (
                ("time of a micro-batch", "mean_ms", "around"),
                ("time of a micro-batch", "mean_ms", "inside"),
                ("memory", "total_bytes", "around"),
            )
        ],
    }
    _print(results)
    write(results, output)
    return results


def accumulator_bytes(preset: str) -> dict[str, Any]:
    """Of a whole model with its embedding and head, all in bfloat16, at the preset's rank."""
    params, rank = llama_shapes(preset), run_preset(preset).optimizer.rank
    tx = ng.galore_adamw(RATE, rank=rank)
    low = jax.eval_shape(
        ng.training.low_rank_steps(tx).project, params, jax.eval_shape(tx.init, params)
    )
    full_bytes, low_bytes = _nbytes(params), _nbytes(low)
    return {
        "rank": rank,
        "full_bytes": full_bytes,
        "subspace_bytes": low_bytes,
        "ratio": low_bytes / full_bytes,
    }


def accumulation_cost(
    preset: str, layers: int, rank: int, number: int, rounds: int, seed: int
) -> dict[str, Any]:
    """Time and memory of taking one gradient, for each of the three ways, in turns."""
    key = jax.random.key(seed)
    shapes = hidden_shapes(preset, layers, stacked=True)
    params = random_tree(shapes, key, 0.02)
    grads = [random_tree(shapes, jax.random.fold_in(key, i), 1e-3) for i in range(number)]
    ways = {name: make(rank, number, params) for name, make in WAYS.items()}
    programs, samples, rows = {}, {name: [] for name in ways}, {}
    for name, (step, carry) in ways.items():
        program = jax.jit(step, donate_argnums=1).lower(grads[0], carry).compile()
        programs[name], rows[name] = program, _memory(program, carry)
    carries = {name: jax.tree.map(jnp.copy, carry) for name, (_, carry) in ways.items()}
    for _ in range(rounds):
        for name, program in programs.items():
            for gradient in grads:
                start = time.process_time()
                carries[name] = jax.block_until_ready(program(gradient, carries[name]))
                samples[name].append(1e3 * (time.process_time() - start))
    for name, row in rows.items():
        steps = [samples[name][i : i + number] for i in range(number, len(samples[name]), number)]
        row["mean_ms"] = median([sum(step) / number for step in steps])
        row["between_ms"] = median([ms for step in steps for ms in step[:-1]])
        row["last_ms"] = median([step[-1] for step in steps])
    return {
        "preset": preset,
        "layers": layers,
        "rank": rank,
        "number": number,
        "matrices": {name: list(shape) for name, shape in shapes.items()},
        "ways": rows,
        "samples_ms": samples,
    }


def _around(rank: int, number: int, params: Any) -> tuple[Callable[..., Any], Any]:
    return _with_optax(optax.MultiSteps(_optimizer(rank, number), number), params)


def _inside(rank: int, number: int, params: Any) -> tuple[Callable[..., Any], Any]:
    adam = optax.MultiSteps(optax.scale_by_adam(), number)
    return _with_optax(_optimizer(rank, number, adam), params)


def _subspace(rank: int, number: int, params: Any) -> tuple[Callable[..., Any], Any]:
    tx = _optimizer(rank, number)
    steps, opt_state = ng.training.low_rank_steps(tx), tx.init(params)

    def step(grads, carry):
        params, opt_state, mean, position = carry
        new = accumulate_low_rank(steps, grads, opt_state, params, mean, position, number)
        return *new, (position + 1) % number

    mean = empty_accumulator(steps, params, opt_state)
    return step, (params, opt_state, mean, jnp.zeros([], jnp.int32))


WAYS = {"around": _around, "inside": _inside, "subspace": _subspace}


def _optimizer(rank: int, number: int, adam: Any = None) -> optax.GradientTransformation:
    """GaLore, without a refresh after the first step for as long as anybody measures."""
    return ng.chain(
        ng.low_rank_project(rank, 1000 * number, transition="keep", stagger=False),
        optax.scale_by_adam() if adam is None else adam,
        ng.project_back(0.25),
        optax.scale_by_learning_rate(RATE),
    )


def _with_optax(tx: Any, params: Any) -> tuple[Callable[..., Any], Any]:
    def step(grads, carry):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, tx.init(params))


def _memory(program: jax.stages.Compiled, carry: Any) -> dict[str, int]:
    """Bytes of what is kept, of the accumulator alone, and of the program's temporary arrays."""
    analysis = program.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend gives no account of the memory of compiled programs")
    params, state, *low_rank = carry
    accumulator = low_rank[0] if low_rank else optax.tree.get(state, "acc_grads")
    kept, temporary = _nbytes(carry) - _nbytes(params), analysis.temp_size_in_bytes
    return {
        "accumulator_bytes": _nbytes(accumulator),
        "kept_bytes": kept,
        "temporary_bytes": temporary,
        "total_bytes": kept + temporary,
    }


def _nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _print(results: dict[str, Any]) -> None:
    print("(a) accumulator of a whole model in bfloat16, MB")
    print(f"  {'model':8}{'rank':>6}{'full':>10}{'subspace':>10}{'ratio':>8}")
    for name, row in results["memory"].items():
        full, low = row["full_bytes"] / 1e6, row["subspace_bytes"] / 1e6
        print(f"  {name:8}{row['rank']:6}{full:10.1f}{low:10.1f}{row['ratio']:8.3f}")
    cost = results["cost"]
    print(
        f"\n(b) {cost['layers']} layers of {cost['preset']} at rank {cost['rank']}, "
        f"{cost['number']} micro-batches a step: ms of processor time, MB"
    )
    print(
        f"  {'':10}{'mean':>9}{'between':>9}{'last':>9}{'accumulator':>13}{'kept':>9}"
        f"{'temporary':>11}"
    )
    for name, row in cost["ways"].items():
        times = "".join(f"{row[f'{part}_ms']:9.1f}" for part in ("mean", "between", "last"))
        bytes_ = [row[f"{part}_bytes"] / 1e6 for part in ("accumulator", "kept", "temporary")]
        print(f"  {name:10}{times}{bytes_[0]:13.1f}{bytes_[1]:9.1f}{bytes_[2]:11.1f}")
    print_targets(results["targets"])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
