"""Polar factors from products of matrices, against the SVD in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgalore_jax._src.kernels.basis import new_basis, start_basis
from natgalore_jax._src.kernels.orthonormal import (
    CONDITIONED,
    QUINTICS,
    nearly_polar,
    polar_factor,
)

RNG = np.random.default_rng(0)


def orthogonal(m, r):
    return np.linalg.qr(RNG.standard_normal((m, r)))[0]


def loss_of_orthonormality(X):
    X = np.asarray(X, np.float64)
    return np.abs(X.T @ X - np.eye(X.shape[1])).max()


@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (40, 7), (40, 40)])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3])
def test_the_polar_factor_is_that_of_an_svd(shape, condition):
    U, V = orthogonal(*shape), orthogonal(shape[1], shape[1])
    Y = U * np.geomspace(1, 1 / condition, shape[1]) @ V.T
    # What the rounding of Y to float32 moves its polar factor by.
    atol = 1e-6 * condition
    for scale in (1.0, 1e-12, 1e12):
        X = polar_factor(jnp.asarray(scale * Y, jnp.float32))
        np.testing.assert_allclose(X, U @ V.T, atol=atol)
        assert loss_of_orthonormality(X) < 3e-6


def test_columns_that_are_nearly_dependent_become_orthonormal():
    for condition in (1e5, 1e7):
        U, V = orthogonal(60, 20), orthogonal(20, 20)
        Y = U * np.geomspace(1, 1 / condition, 20) @ V.T
        assert loss_of_orthonormality(polar_factor(jnp.asarray(Y, jnp.float32))) < 3e-6


def test_conditioned_columns_keep_their_space():
    Y = jnp.asarray(orthogonal(60, 5) * np.geomspace(1, 1e-3, 5) @ orthogonal(5, 5), jnp.float32)
    X = np.asarray(nearly_polar(Y, CONDITIONED), np.float64)
    values = np.linalg.svd(X, compute_uv=False)
    assert values.min() > 0.7 and values.max() < 1.3
    Q, P = np.linalg.qr(X)[0], np.linalg.qr(np.asarray(Y, np.float64))[0]
    np.testing.assert_allclose(Q @ Q.T, P @ P.T, atol=1e-3)


def test_quintics_are_the_best_of_their_degree():
    """Their error has the same size, with alternating signs, at four points (Chebyshev)."""
    low, high = 1e-3, 1.0
    for a, b, c in QUINTICS[:5]:
        x = np.linspace(low, high, 2_000_001)
        error = 1 - (a * x + b * x**3 + c * x**5)
        largest = np.abs(error).max()
        extrema = [0, *(np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1), len(x) - 1]
        np.testing.assert_allclose(np.abs(error[extrema]), largest, rtol=1e-3)
        assert np.all(np.diff(np.sign(error[extrema])) != 0) and len(extrema) == 4
        low, high = 1 - largest, 1 + largest


def test_a_pass_of_quintics_ends_at_one():
    x = np.geomspace(1e-3, 1, 10_001)
    for a, b, c in QUINTICS:
        x = a * x + b * x**3 + c * x**5
    assert np.abs(x - 1).max() < 1e-8


def spectra(m, n, r):
    k = min(m, n)
    U, V, number = orthogonal(m, k), orthogonal(n, k), np.arange(k)
    for power in (0.5, 1.0, 2.0, 4.0):
        yield f"power {power}", U * (1.0 + number) ** -power @ V.T
    yield "rank one", np.outer(RNG.standard_normal(m), RNG.standard_normal(n))
    yield "all ones", np.ones((m, n))
    yield "tail of 1e-8", U * np.where(number < 3, 1, 1e-8) @ V.T
    yield "cluster at the rank", U * np.where(number < r, 1, 0.999) @ V.T
    one_row, one_entry = np.zeros((m, n)), np.zeros((m, n))
    one_row[m // 3], one_entry[m // 3, n // 2] = 1.0, 1e-30
    yield "one row", one_row
    yield "one tiny entry", one_entry
    twice = RNG.standard_normal((m, n))
    twice[:, 1::2] = twice[:, : 2 * (n // 2) : 2]
    twice[m - m // 4 :] = 0
    yield "equal columns, zero rows", twice
    spike = np.zeros((m, n))
    np.fill_diagonal(spike, 1.0)
    spike[0, 0] = 1e5
    yield "spike", spike


@pytest.mark.parametrize("shape", [(64, 172, 16), (48, 48, 47), (48, 48, 48), (70, 24, 24)])
@pytest.mark.parametrize("is_first", [True, False])
def test_power_steps_on_every_spectrum(shape, is_first):
    m, n, r = shape
    refresh = jax.jit(
        lambda G, P: new_basis("power", G, P, jax.random.key(0), jnp.asarray(is_first))
    )
    starts = [start_basis(m, r), jnp.asarray(orthogonal(m, r), jnp.float32), jnp.eye(m, r)]
    for name, G in spectra(m, n, r):
        G = jnp.asarray(G, jnp.float32)
        best = np.sum(np.linalg.svd(np.asarray(G, np.float64), compute_uv=False)[:r] ** 2)
        for start in starts:
            P = refresh(G, start)
            assert loss_of_orthonormality(P) < 1e-5, name
            energy = np.sum((np.asarray(P, np.float64).T @ np.asarray(G, np.float64)) ** 2)
            # Five steps from a start that is no basis of the last gradient find less than eight do.
            assert energy > (0.99 if is_first else 0.97) * best, name
