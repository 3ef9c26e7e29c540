"""Time of the optimizer update alone, next to its floor on the same machine.

``python -m benchmarks.optimizer.step_time`` runs ``optax.adamw``, ``optax.contrib.galore`` and the
library's ``galore_adamw`` and ``natural_galore_adamw``, default arguments but for rank and
interval, on the hidden matrices of a LLaMA preset in float32, with random gradients. The updates
are compiled beforehand and their states donated; the methods take turns, so that a machine that
slows down slows all of them. The first step, in which every basis is new, is the cold start; then
two whole intervals are timed.

``optax.contrib.galore`` refreshes all matrices in one step, which takes as long as hundreds of
others. It runs in one round of ``sample_every`` only, at an interval shorter by that factor, so
that its refreshes are timed twice; its amortised time is computed from the medians of both kinds of
steps: (refresh + (interval - 1) · ordinary) / interval.

The floor is bytes / copy bandwidth + operations / rate of the products, both measured in between
the steps, the bandwidth with memory that is there already; ``benchmarks/optimizer/floor.py`` says
what is counted. It knows no refresh. "fresh" is the floor with the bandwidth into newly allocated
memory.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import optax

import natgalore_jax as ng
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, print_targets, target, write_results
from benchmarks.common.shapes import hidden_shapes, matrices, random_tree
from benchmarks.common.timing import Updater
from benchmarks.optimizer.floor import (
    Machine,
    accelerator_bounds,
    bytes_moved,
    floor_seconds,
    operations,
)
from benchmarks.optimizer.training_share import print_share, training_share
from examples.llama.model.config import PresetName

SCALED_TOKENS = 131_072  # of a step in the protocol of the GaLore papers: 512 rows of 256
GRADIENTS = 2  # trees of gradients, in turns


def main(
    preset: PresetName = "60m",
    layers: int | None = None,
    stacked: bool = False,
    rank: int = 128,
    interval: int = 200,
    history: int = 0,
    sample_every: int = 4,
    share: bool = True,
    batch: int = 8,
    length: int = 256,
    rounds: int = 5,
    copy_mib: int = 256,
    seed: int = 0,
    output: Path = RESULTS / "step_time.json",
) -> dict[str, Any]:
    """Time the update of four optimizers next to its floor.

    Args:
      preset: the model.
      layers: as many of its layers; by default all.
      stacked: the layers in one leaf; optax.contrib.galore cannot do that and is left out.
      rank: of the subspaces.
      interval: steps between two refreshes of a matrix.
      history: gradients kept for the natural gradient; 0: its compact form, which is the default.
      sample_every: rounds between two samples of the machine and of optax.contrib.galore; it
        divides the interval.
      share: also time whole training steps.
      batch: rows of a training step.
      length: tokens in a row.
      rounds: training steps timed, the first of them not counted.
      copy_mib: size of the vector that measures the bandwidth.
      seed: of parameters, gradients and tokens.
      output: where the results go.
    """
    if interval % sample_every or interval < 2 * sample_every:
        raise ValueError(f"{interval=} must be {sample_every=} times a number above 1")
    setting = dict(locals())
    del setting["output"]
    where_and_how = environment(seed)
    shapes = hidden_shapes(preset, layers, stacked)
    sides = matrices(shapes)
    factories: dict[str, Callable[[], Any]] = {
        "adamw": lambda: optax.adamw(1e-3),
        "contrib": lambda: optax.contrib.galore(
            # The decay that is the default of the others, so that all read the parameters.
            1e-2,
            rank=rank,
            update_proj_gap=interval // sample_every,
            weight_decay=1e-4,
        ),
        "galore": lambda: ng.galore_adamw(1e-2, rank=rank, update_interval=interval),
        "natural": lambda: (
            ng.chain(
                ng.natural_galore(rank, update_interval=interval, history=history),
                optax.adamw(1e-2),
            )
            if history
            else ng.natural_galore_adamw(1e-2, rank=rank, update_interval=interval)
        ),
    }
    if stacked:
        del factories["contrib"]

    machine, updaters = _run(factories, shapes, rank, interval, sample_every, copy_mib, seed)
    figures = machine.figures()
    methods = {}
    for name, updater in updaters.items():
        gap = interval // sample_every if name == "contrib" else None
        row = {
            **(
                sampled(updater.samples, gap, interval) if gap else timed(updater.samples, interval)
            ),
            "bytes": bytes_moved(name, sides, rank, history),
            "operations": operations(name, sides, rank),
        }
        row["accelerator_bounds_s"] = accelerator_bounds(row["bytes"], row["operations"])
        for kind in ("", "fresh_"):
            bandwidth = figures[f"{kind}copy_bytes_per_s"]
            rate = figures["product_operations_per_s"]
            floor = floor_seconds(row["bytes"], row["operations"], bandwidth, rate)
            row[f"{kind}floor_s"] = floor
            row[f"amortised_to_{kind}floor"] = row["amortised_s"] / floor
        methods[name] = row
    if "contrib" in methods:
        for row in methods.values():
            row["amortised_to_contrib"] = row["amortised_s"] / methods["contrib"]["amortised_s"]

    factories.pop("contrib", None)  # It would project the embedding and the head.
    results = {
        "environment": where_and_how,
        "settings": {**setting, "matrices": len(sides), "steps": 1 + 2 * interval},
        "machine": figures,
        "methods": methods,
        "targets": _targets(methods),
        "training_step": training_share(
            factories, preset, layers, batch, length, SCALED_TOKENS, rounds, seed
        )
        if share
        else None,
        "samples_s": {name: updater.samples for name, updater in updaters.items()},
    }
    _print(results)
    write_results(results, output)
    return results


def _run(factories, shapes, rank, interval, sample_every, copy_mib, seed):
    key = jax.random.key(seed)
    params = random_tree(shapes, key, 0.02)
    grads = [random_tree(shapes, jax.random.fold_in(key, 1 + i), 1e-3) for i in range(GRADIENTS)]
    updaters = {name: Updater(make(), grads[0], params) for name, make in factories.items()}
    machine = Machine(matrices(shapes), rank, copy_mib)
    for step in range(1 + 2 * interval):
        is_sampled = step % sample_every == 0
        for name, updater in updaters.items():
            if name != "contrib" or is_sampled:
                updater.step(grads[step % GRADIENTS], params)
        if is_sampled:
            machine.sample()
    return machine, updaters


def timed(samples: list[float], interval: int) -> dict[str, Any]:
    """Figures of a method that took every step: the first one, and two intervals after it."""
    steps = np.array(samples[1:]).reshape(2, interval)
    middle, worst = median(steps.ravel().tolist()), float(steps.max())
    # What the schedule does it does in both intervals; what the machine does it hardly does twice.
    repeated = float(steps.min(axis=0).max())
    return {
        "computed": False,
        "cold_start_s": samples[0],
        "median_s": middle,
        "amortised_s": float(steps.mean()),
        "worst_s": worst,
        "worst_to_median": worst / middle,
        "worst_repeated_s": repeated,
        "worst_repeated_to_median": repeated / middle,
    }


def sampled(samples: list[float], gap: int, interval: int) -> dict[str, Any]:
    """Figures of a method that was sampled and refreshes everything at every ``gap``-th sample."""
    later = list(enumerate(samples))[1:]
    refreshes = [s for i, s in later if i % gap == 0]
    ordinary = median([s for i, s in later if i % gap])
    refresh = median(refreshes)
    worst, repeated = max(s for _, s in later), min(refreshes)
    return {
        "computed": True,
        "cold_start_s": samples[0],
        "median_s": ordinary,
        "refresh_s": refresh,
        "amortised_s": (refresh + (interval - 1) * ordinary) / interval,
        "worst_s": worst,
        "worst_to_median": worst / ordinary,
        "worst_repeated_s": repeated,
        "worst_repeated_to_median": repeated / ordinary,
    }


def _targets(methods: dict[str, Any]) -> list[dict[str, Any]]:
    targets = []
    for name, limit in (("galore", 1.3), ("natural", 1.6)):
        row = methods[name]
        targets.append(target(f"{name}, amortised / floor", row["amortised_to_floor"], limit))
        targets.append(target(f"{name}, worst / median", row["worst_to_median"], 1.5))
        if "amortised_to_contrib" in row:
            ratio = row["amortised_to_contrib"]
            targets.append(target(f"{name}, amortised / optax.contrib.galore", ratio, 1.0))
    return targets


def _print(results: dict[str, Any]) -> None:
    machine, settings = results["machine"], results["settings"]
    print(
        f"{settings['matrices']} matrices of {settings['preset']}, rank {settings['rank']}, "
        f"interval {settings['interval']}, history {settings['history']}; ms\n"
        f"copy {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s, into fresh memory "
        f"{machine['fresh_copy_bytes_per_s'] / 1e9:.1f} GB/s, products "
        f"{machine['product_operations_per_s'] / 1e9:.0f} Gop/s\n"
    )
    columns = ("cold", "median", "amort.", "worst", "/median", "repeated", "floor", "/floor")
    print(f"{'':10}" + "".join(f"{c:>10}" for c in (*columns, "/fresh", "/contrib")))
    for name, row in results["methods"].items():
        keys = ("cold_start_s", "median_s", "amortised_s", "worst_s")
        line = "".join(f"{1e3 * row[key]:10.1f}" for key in keys)
        line += f"{row['worst_to_median']:10.2f}{row['worst_repeated_to_median']:10.2f}"
        line += f"{1e3 * row['floor_s']:10.1f}{row['amortised_to_floor']:10.2f}"
        line += f"{row['amortised_to_fresh_floor']:10.2f}"
        line += f"{row.get('amortised_to_contrib', float('nan')):10.2f}"
        print(f"{name:10}{line}")
    print("\nLower bounds from published figures, ms")
    for name, row in results["methods"].items():
        bounds = (f"{k} {1e3 * v:.3f}" for k, v in row["accelerator_bounds_s"].items())
        print(f"{name:10}{'   '.join(bounds)}")
    if results["training_step"]:
        print_share(results["training_step"])
    print_targets(results["targets"])


if __name__ == "__main__":
    run_from_command_line(main)
