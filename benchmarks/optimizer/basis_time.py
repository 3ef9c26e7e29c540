"""Time of one new basis by each method, from a gradient that is in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.timing import median, seconds
from natgalore_jax._src.kernels.basis import WARM_STEPS, new_basis

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
    exact = _energy(G, compiled["svd"](G, P, key, is_first))
    return {
        "shape": list(shape),
        "rank": rank,
        "median_s": times,
        "to_svd": {method: t / times["svd"] for method, t in times.items()},
        "energy_to_svd": {
            method: _energy(G, refresh(G, P, key, is_first)) / exact
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


def _energy(G: jax.Array, P: jax.Array) -> float:
    return float(np.sum(np.square(np.asarray(P, np.float64).T @ np.asarray(G, np.float64))))
