"""Time, captured energy and memory of a refresh.

``python -m benchmarks.optimizer.refresh`` measures (a) the time of a warm power refresh beside a
randomised SVD, Gram matrix and eigenvectors, the exact SVD, and the same power steps by
factorisations; (b) the energy ‖PᵀG‖² that warm refreshes capture of the gradients of a model in
training, relative to the exact SVD's; (c) what the refresh adds to the temporary memory of the
compiled update of a stack of layers.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import natgalore_jax as ng
import natgalore_jax._src.subspace.subspace as _subspace
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, print_targets, target, write_results
from benchmarks.common.timing import seconds
from benchmarks.optimizer.basis_energy import basis_energy, captured_energy
from examples.llama.data import DataConfig
from examples.llama.memory.step_memory import temporary_bytes
from examples.llama.model.config import PresetName
from natgalore_jax._src.kernels.basis import WARM_STEPS, new_basis


def main(
    shape: tuple[int, int] = (1024, 2736),
    rank: int = 128,
    rounds: int = 8,
    preset: PresetName = "nano",
    layers: int | None = None,
    steps: int = 200,
    intervals: tuple[int, ...] = (50, 200),
    batch: int | None = None,
    stack: tuple[int, int, int] = (8, 512, 1376),
    history: int = 0,
    seed: int = 0,
    data: tyro.conf.Suppress[DataConfig | None] = None,
    output: Path = RESULTS / "refresh.json",
) -> dict[str, Any]:
    """Measure time, energy and memory of a refresh.

    Args:
      shape: of the matrix that is timed.
      rank: of its subspace, and of the stack's.
      rounds: how often each method is timed, the first not counted.
      preset: the model that is trained, at its own rank.
      layers: as many of its layers; by default all.
      steps: of training; at the longest interval or above, every matrix has a warm refresh.
      intervals: steps between two refreshes of a matrix.
      batch: rows in a batch; by default the preset's.
      stack: (layers, m, n) of the leaf whose update is compiled.
      history: gradients kept for the natural gradient, in that update; 0: its compact form.
      seed: of parameters, gradients and data.
      data: the text; by default the preset's.
      output: where the results go.
    """
    where_and_how = environment(seed)
    time = basis_time(shape, rank, rounds, seed)
    energy = basis_energy(preset, layers, steps, intervals, seed, data, batch)
    memory = update_memory(stack, rank, history)
    results = {
        "environment": where_and_how,
        "time": time,
        "energy": energy,
        "memory": memory,
        "targets": [
            target("warm refresh, time / exact SVD", time["to_svd"]["power"], 0.1),
            target(
                "warm refresh, time / the same by factorisations",
                time["median_s"]["power"] / time["median_s"]["power by factorisations"],
                1.0,
            ),
            target(
                "largest entry of PᵀP − I",
                max(row["orthonormality"] for row in energy["refreshes"]),
                1e-5,
            ),
            *(
                target(
                    f"energy / exact SVD, smallest, interval {T}", row["all"]["min"], 0.995, False
                )
                for T, row in energy["warm"].items()
            ),
            *(
                target(f"{name}, memory / one layer's refresh", row["refresh_to_one_layer"], 1.0)
                for name, row in memory["optimizers"].items()
            ),
        ],
    }
    _print(results)
    write_results(results, output)
    return results


def _print(results: dict[str, Any]) -> None:
    time, energy, memory = (results[key] for key in ("time", "energy", "memory"))
    print(f"(a) a new basis of {time['shape']} at rank {time['rank']}")
    for method, taken in time["median_s"].items():
        print(
            f"  {method:24}{1e3 * taken:8.1f} ms   / SVD {time['to_svd'][method]:6.3f}   "
            f"energy / SVD {time['energy_to_svd'][method]:.4f}"
        )
    print(
        f"\n(b) energy / SVD on gradients of {energy['preset']} at rank {energy['rank']}, "
        f"{energy['steps']} steps, last loss {energy['last_loss']:.2f}"
    )
    print(f"  {'interval':>8} {'matrix':8}{'number':>8}{'min':>10}{'mean':>10}{'stale min':>11}")
    for T, kinds in energy["warm"].items():
        for kind, row in kinds.items():
            stale = energy["stale"][T][kind]["min"]
            print(
                f"  {T:>8} {kind:8}{row['count']:8}{row['min']:10.5f}{row['mean']:10.5f}"
                f"{stale:11.5f}"
            )
    print(
        f"\n(c) temporary MiB of the update of {memory['shape']}; one layer's refresh alone "
        f"{memory['one_layer_refresh_bytes'] / 2**20:.2f}"
    )
    for name, row in memory["optimizers"].items():
        print(
            f"  {name:10}with refresh {row['with_refresh_bytes'] / 2**20:8.2f}   without "
            f"{row['without_refresh_bytes'] / 2**20:8.2f}"
        )
    print_targets(results["targets"])


METHODS = ("power", "power by factorisations", "randomized", "eigh", "svd")
DRIFT = 0.2  # radians between the gradient of the last refresh and this one


def basis_time(shape: tuple[int, int], rank: int, rounds: int, seed: int) -> dict[str, Any]:
    """Each method in turn, ``rounds`` times; the first round is not counted.

    The gradient has singular values ~ 1/√k, and has turned by ``DRIFT`` since the previous basis
    was found. "power" is a warm refresh, some steps from the previous basis, and so is "power by
    factorisations", with QR and Cholesky instead of products; the others start anew.
    """
    rng = np.random.default_rng(seed)
    last, other = (_power_law(rng, shape) for _ in range(2))
    G = jnp.cos(DRIFT) * last + jnp.sin(DRIFT) * other
    key, is_first = jax.random.key(seed), jnp.array(False)
    compiled = {
        method: jax.jit(
            lambda G, P, key, is_first, method=method: (
                _by_factorisations(G, P)
                if method == "power by factorisations"
                else new_basis(method, G, P, key, is_first)
            )
        )
        .lower(G, jnp.zeros((shape[0], rank)), key, is_first)
        .compile()
        for method in METHODS
    }
    P = compiled["svd"](last, jnp.zeros((shape[0], rank)), key, is_first)
    samples: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method, refresh in compiled.items():
            samples[method].append(seconds(refresh, G, P, key, is_first))
    times = {method: median(taken[1:]) for method, taken in samples.items()}
    exact = captured_energy(compiled["svd"](G, P, key, is_first), G)
    return {
        "shape": list(shape),
        "rank": rank,
        "median_s": times,
        "to_svd": {method: t / times["svd"] for method, t in times.items()},
        "energy_to_svd": {
            method: captured_energy(refresh(G, P, key, is_first), G) / exact
            for method, refresh in compiled.items()
        },
        "samples_s": samples,
    }


def _by_factorisations(G: jax.Array, P: jax.Array) -> jax.Array:
    """``qr((G Gᵀ)^q P)``, well conditioned in between by Cholesky factors of YᵀY."""

    def step(_, Y):
        Y = G @ (G.T @ Y)
        Y = Y / jnp.max(jnp.abs(Y))
        S = Y.T @ Y
        L = jnp.linalg.cholesky(S + 1e-6 * jnp.trace(S) * jnp.eye(S.shape[0]))
        return jax.lax.linalg.triangular_solve(L, Y, lower=True, transpose_a=True)

    with jax.default_matmul_precision("highest"):
        Y = jax.lax.fori_loop(0, WARM_STEPS - 1, step, P)
        return jnp.linalg.qr(G @ (G.T @ Y))[0]


def _power_law(rng: np.random.Generator, shape: tuple[int, int]) -> jax.Array:
    m, n = shape
    U = np.linalg.qr(rng.standard_normal((m, min(m, n))))[0]
    V = np.linalg.qr(rng.standard_normal((n, min(m, n))))[0]
    return jnp.asarray((U / np.sqrt(1 + np.arange(min(m, n)))) @ V.T, jnp.float32)


def update_memory(shape: tuple[int, int, int], rank: int, history: int) -> dict[str, Any]:
    """Bytes, from the compiler's own account; nothing is run.

    LAPACK's workspaces are allocated inside of its calls and are not in the account.

    Args:
      shape: (layers, m, n) of one stacked leaf, float32.
      rank: of the subspace, of the rows if m ≤ n.
      history: gradients kept for the natural gradient.

    Returns:
      For each optimizer the temporary bytes of the update with and without the refresh, and what
      one layer's refresh takes when it is compiled alone.
    """
    factories: dict[str, Callable[[], optax.GradientTransformation]] = {
        "galore": lambda: ng.galore_adamw(1e-2, rank=rank),
        "natural": lambda: (
            ng.chain(ng.natural_galore(rank, history=history), optax.adamw(1e-2))
            if history
            else ng.natural_galore_adamw(1e-2, rank=rank)
        ),
    }
    with_refresh = {name: _temporary_bytes(make(), shape) for name, make in factories.items()}
    with mock.patch.object(_subspace, "refresh", _no_refresh):
        without = {name: _temporary_bytes(make(), shape) for name, make in factories.items()}
    one_layer = _one_layer(shape[-2:], rank)
    return {
        "shape": list(shape),
        "rank": rank,
        "history": history,
        "one_layer_refresh_bytes": one_layer,
        "optimizers": {
            name: {
                "with_refresh_bytes": with_refresh[name],
                "without_refresh_bytes": without[name],
                "refresh_bytes": with_refresh[name] - without[name],
                "refresh_to_one_layer": (with_refresh[name] - without[name]) / one_layer,
            }
            for name in factories
        },
    }


def _temporary_bytes(tx: optax.GradientTransformation, shape: tuple[int, ...]) -> int:
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    # jit would find the program that it traced before under the same function.
    update = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    return temporary_bytes(update.lower(params, state, params).compile())


def _no_refresh(settings, plans, gradients, bases, basis_states, **_):
    del settings, plans, gradients
    return list(bases), list(basis_states)


def _one_layer(shape: tuple[int, ...], rank: int) -> int:
    """Of a new basis for one matrix, in a program of its own."""
    m, n = min(shape), max(shape)
    arguments = (
        jax.ShapeDtypeStruct((m, n), jnp.float32),
        jax.ShapeDtypeStruct((m, min(rank, m)), jnp.float32),
        jax.ShapeDtypeStruct((), bool),
    )
    alone = jax.jit(lambda G, P, first: new_basis("power", G, P, jax.random.key(0), first))
    return temporary_bytes(alone.lower(*arguments).compile())


if __name__ == "__main__":
    run_from_command_line(main)
