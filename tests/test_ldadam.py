"""LDAdam against its algorithm in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles.ldadam import ldadam
from replay import replay

import natgalore_jax as ng
from natgalore_jax._src.kernels.basis import start_basis

STEPS, RANK = 8, 3
RNG = np.random.default_rng(0)
# A shared signal, so that successive subspaces overlap as those of a training run do.
SIGNAL = 3 * RNG.standard_normal((6, RANK)) @ RNG.standard_normal((RANK, 9))
G = (SIGNAL + RNG.standard_normal((STEPS, 6, 9))).astype(np.float32)
W = RNG.standard_normal((6, 9)).astype(np.float32)
SETTINGS = {"rank": RANK, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "rho": 0.7}


def flip(x):
    return np.swapaxes(x, -1, -2)


@pytest.mark.parametrize("error_feedback", [False, True])
def test_every_step(error_feedback):
    tx = ng.contrib.ldadamw(0.1, **SETTINGS, weight_decay=0.0, error_feedback=error_feedback)
    bias = RNG.standard_normal((STEPS, 6)).astype(np.float32)
    trajectory = replay(
        tx,
        {"bias": bias[0], "tall": flip(W), "wide": W},
        {"bias": bias, "tall": flip(G), "wide": G},
    )
    start = start_basis(6, RANK)
    oracle = {k: v for k, v in SETTINGS.items() if k != "rank"}
    expected = ldadam(W, G, start, **oracle, lr=0.1, error_feedback=error_feedback)
    np.testing.assert_allclose(trajectory["wide"], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(flip(trajectory["tall"]), expected, rtol=1e-3, atol=1e-4)
    plain = replay(optax.adam(0.1, b1=0.8, b2=0.9, eps=1e-3), {"b": bias[0]}, {"b": bias})
    np.testing.assert_allclose(trajectory["bias"], plain["b"], rtol=1e-5)


def test_the_basis_is_orthonormal_and_comes_to_span_a_constant_gradient_of_its_rank():
    tx = ng.contrib.scale_by_ldadam(rank=RANK)
    grads = {"w": jnp.asarray(SIGNAL, jnp.float32)}
    state = tx.init(grads)
    for _ in range(3):
        _, state = tx.update(grads, state)
        P = np.asarray(state.basis["w"])
        np.testing.assert_allclose(P.T @ P, np.eye(RANK), atol=1e-5)
        np.testing.assert_allclose(P @ (P.T @ SIGNAL), SIGNAL, atol=1e-4 * np.abs(SIGNAL).max())


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_first_gradient_that_is_zero_or_not_finite_leaves_the_basis(bad):
    tx = ng.contrib.scale_by_ldadam(rank=RANK)
    state = tx.init({"w": jnp.zeros((2, 6, 9))})
    layers = jnp.stack([jnp.full((6, 9), bad), jnp.asarray(G[0])])
    _, after = tx.update({"w": layers}, state)
    np.testing.assert_array_equal(after.basis["w"][0], state.basis["w"][0])
    assert jnp.all(jnp.isfinite(after.basis["w"][1]))
    assert not np.allclose(after.basis["w"][1], state.basis["w"][1], atol=1e-2)


def test_no_subspace_is_a_trap():
    """Gradients in other rows and other columns than all before: (P + M)ᵀ A is zero."""
    tx = ng.contrib.scale_by_ldadam(rank=RANK)
    update, state = jax.jit(tx.update), tx.init({"w": jnp.zeros((8, 12))})
    A = jnp.asarray(np.random.default_rng(0).standard_normal((RANK, 6)), jnp.float32)
    for t in range(40):
        rows, columns = (slice(0, RANK), slice(0, 6)) if t < 5 else (slice(4, 7), slice(6, 12))
        gradient = jnp.zeros((8, 12)).at[rows, columns].set(A)
        _, state = update({"w": gradient}, state)
    P = np.asarray(state.basis["w"], np.float64)
    assert np.sum((P.T @ gradient) ** 2) > 0.99 * np.sum(np.square(gradient))


@pytest.mark.parametrize("factor", [1e-20, 1e15])
def test_the_basis_does_not_depend_on_the_size_of_the_gradient(factor):
    tx = ng.contrib.scale_by_ldadam(rank=RANK)
    plain, scaled = (
        tx.update({"w": f * jnp.asarray(G[0])}, tx.init({"w": jnp.zeros((6, 9))}))[1].basis["w"]
        for f in (1.0, factor)
    )
    np.testing.assert_allclose(scaled @ scaled.T, plain @ plain.T, atol=1e-4)


def test_error_feedback_costs_a_buffer_of_the_size_of_the_parameter():
    params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)}
    without, with_buffer = (
        ng.memory_report(ng.contrib.ldadamw(1e-2, rank=8, error_feedback=flag), params)
        for flag in (False, True)
    )
    assert without.parameters[0].state_bytes == 2 * (64 * 8 + 2 * 8 * 256)
    assert with_buffer.total_state_bytes - without.total_state_bytes == 2 * 64 * 256
    assert without.alternative_state_bytes == {}
