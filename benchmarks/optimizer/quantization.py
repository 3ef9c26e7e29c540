"""State in few bits: how wrong, how fast, how much memory.

``python -m benchmarks.optimizer.quantization`` compares (a) the updates of Adam whose moments go
through eight bits at every step with those of Adam in float32, on synthetic gradients: entries of
different sizes within a block, noise around a mean that changes, a tenth of them silent in the
second half. Beside this library's format with its dithered rounding there are the same with random
numbers and with rounding to nearest, the dynamic map of 8-bit Adam (Dettmers et al., 2022), and
evenly spaced codes; (b) time, state and temporary memory of the update for the hidden matrices of a
LLaMA preset, as in ``benchmarks.optimizer.step_time``, with moments in eight bits, with bases and
with a history of ten gradients in eight and in four, and the floor: what the machine takes for the
bytes that must move (gradient and state read, update and moments written) and for the products of
the projection, both measured in between. Processor seconds are those of all threads together:
unlike wall time they hardly change when other programs run.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import natgalore_jax as ng
from benchmarks.common.environment import RESULTS, environment, print_targets, target, write_results
from benchmarks.common.shapes import hidden_shapes, matrices, random_tree
from benchmarks.common.timing import Updater
from benchmarks.optimizer.floor import Machine, floor_seconds, operations
from examples.llama.memory.step_memory import temporary_bytes
from examples.llama.model.config import PresetName
from natgalore_jax._src.kernels.dither import STRIDES, dither
from natgalore_jax._src.kernels.float8_blocks import Blocks, block_max, decode, encode

HISTORY = 10  # gradients


def main(
    steps: int = 2000,
    spreads: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0),
    preset: PresetName = "60m",
    layers: int | None = None,
    rank: int = 128,
    rounds: int = 12,
    seed: int = 0,
    output: Path = RESULTS / "quantization.json",
) -> dict[str, Any]:
    """Measure error, time and memory of state in few bits.

    Args:
      steps: of training on synthetic gradients.
      spreads: standard deviations of the logarithm of the entries' sizes within a block.
      preset: the model whose hidden matrices are updated.
      layers: as many of its layers; by default all.
      rank: of the subspaces of galore_adamw.
      rounds: updates timed, the first two not counted.
      seed: of gradients and parameters.
      output: where the results go.
    """
    where_and_how = environment(seed)
    errors = {str(spread): quantization_error(spread, steps, seed) for spread in spreads}
    cost = _cost(preset, layers, rank, rounds, seed)
    results = {
        "environment": where_and_how,
        "settings": {
            "steps": steps,
            "preset": preset,
            "layers": layers,
            "rank": rank,
            "rounds": rounds,
        },
        "errors": errors,
        "cost": cost,
        "targets": [
            *(
                target(f"{name}, processor time / float32", cost[name]["processor_to_float32"], 1.5)
                for name in ("adam, 8 bits", "galore, 8 bits")
            ),
            *(
                target(f"largest update, spread {s}", rows["ours"]["largest_update"], 4.0)
                for s, rows in errors.items()
            ),
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
    for spread, rows in results["errors"].items():
        print(f"\n(a) spread {spread}: beside Adam in float32 after {results['settings']['steps']}")
        columns = ("update error", "largest update", "silent", "v ratio", "its std")
        print(f"  {'':22}" + "".join(f"{c:>16}" for c in columns))
        for name, row in rows.items():
            print(f"  {name:22}" + "".join(f"{x:16.4g}" for x in row.values()))
    print(f"\n(b) the update of {results['settings']['preset']}")
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


B1, B2, EPS = 0.9, 0.999, 1e-8
BLOCK, ROWS = 256, 16
SILENT_FROM = 0.5  # a tenth of the entries has no gradient from here on


class Moments(NamedTuple):
    """Moments as a scheme reads them, and bounds on them."""

    m: jax.Array
    v: jax.Array
    bound_m: jax.Array
    bound_v: jax.Array


Scheme = Callable[[Moments, jax.Array], Moments]


def quantization_error(spread: float, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Distance of each scheme's updates and second moments from float32's.

    Args:
      spread: standard deviation of the logarithm of the entries' sizes, within a block of 256.
      steps: of training.
      seed: of the gradients.
    """
    key = jax.random.key(seed)
    keys = jax.random.split(key, 4)
    size = jnp.exp(spread * jax.random.normal(keys[0], (BLOCK, ROWS))) * 1e-3
    mean = 0.2 * size * jax.random.normal(keys[1], size.shape)
    silent = jax.random.uniform(keys[2], size.shape) < 0.1

    def step(carry, t):
        noise = jax.random.normal(jax.random.fold_in(keys[3], t), size.shape)
        g = mean * jnp.cos(t / 300) + size * noise
        g = jnp.where(silent & (t >= SILENT_FROM * steps), 0.0, g)
        stepped = {name: _adam(s, g, t) for name, s in carry.items()}
        exact = stepped["float32"][1]
        figures = {
            name: (
                jnp.sum(jnp.where(silent, 0, u - exact) ** 2),
                jnp.sum(jnp.where(silent, 0, exact) ** 2),
                jnp.max(jnp.abs(u)),
                jnp.max(jnp.abs(jnp.where(silent, u, 0))),
            )
            for name, (_, u) in stepped.items()
        }
        new = {name: SCHEMES[name](s, t) for name, (s, _) in stepped.items()}
        return new, figures

    zero, bound = jnp.zeros(size.shape), jnp.zeros((1, ROWS))
    start = {name: Moments(zero, zero, bound, bound) for name in SCHEMES}
    last, figures = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(start)
    rows = {}
    for name, columns in figures.items():
        error, norm, worst, of_silent = (np.asarray(x, np.float64) for x in columns)
        ratio = np.asarray(last[name].v / last["float32"].v)[~np.asarray(silent)]
        late = slice(steps // 2, None)
        rows[name] = {
            "update_error": float(np.sqrt(error[late].sum() / norm[late].sum())),
            "largest_update": float(worst.max()),
            "last_update_of_silent": float(of_silent[-1]),
            "v_ratio_mean": float(ratio.mean()),
            "v_ratio_std": float(ratio.std()),
        }
    return rows


def _adam(s: Moments, g: jax.Array, t: jax.Array) -> tuple[Moments, jax.Array]:
    peak = jnp.max(jnp.abs(g), 0, keepdims=True)
    s = Moments(
        B1 * s.m + (1 - B1) * g,
        B2 * s.v + (1 - B2) * g * g,
        B1 * s.bound_m + (1 - B1) * peak,
        B2 * s.bound_v + (1 - B2) * peak * peak,
    )
    m, v = s.m / (1 - B1 ** (t + 1)), s.v / (1 - B2 ** (t + 1))
    return s, m / (jnp.sqrt(v) + EPS)


def _ours(noise: Callable[[jax.Array, int], jax.Array | None]) -> Scheme:
    def scheme(s, t):
        codes_m = encode(s.m, s.bound_m, noise(t, 1), is_second=False)
        codes_v = encode(s.v, s.bound_v, noise(t, 0), is_second=True)
        return s._replace(
            m=decode(codes_m, s.bound_m, is_second=False),
            v=decode(codes_v, s.bound_v, is_second=True),
        )

    return scheme


def _by_largest(levels_m: np.ndarray, levels_v: np.ndarray) -> Scheme:
    """The nearest of fixed levels, times the largest absolute value of the block."""

    def nearest(x, levels):
        largest = block_max(x, Blocks(0, BLOCK, 1))
        middles = jnp.asarray((levels[1:] + levels[:-1]) / 2, jnp.float32)
        level = jnp.searchsorted(middles, x / jnp.where(largest > 0, largest, 1))
        return jnp.asarray(levels, jnp.float32)[level] * largest

    return lambda s, t: s._replace(m=nearest(s.m, levels_m), v=nearest(s.v, levels_v))


def _dynamic(is_signed: bool) -> np.ndarray:
    """Seven decades of evenly spaced bins, twice as many in each as in the one below."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (decade + (not is_signed)) + 1)
        levels += list((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    return np.unique([*levels, *(-x for x in levels[2:])] if is_signed else levels)


def _random(t: jax.Array, which: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(which), t)
    return jax.random.bits(key, (BLOCK, ROWS), jnp.uint32)


SCHEMES: Mapping[str, Scheme] = {
    "float32": lambda s, t: s,
    "ours": _ours(lambda t, which: dither((BLOCK, ROWS), t, which, STRIDES[which])),
    "ours, random numbers": _ours(_random),
    "ours, nearest": _ours(lambda t, which: None),
    "dynamic map": _by_largest(_dynamic(True), _dynamic(False)),
    "linear": _by_largest(np.arange(-127, 128) / 127, np.arange(256) / 255),
}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
