"""The residual of project_back and its norm-growth limiter against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles.galore import Adam, svd_bases

import natgalore_jax as ng

# Two-sided, the first R is diagonal but for rounding errors, which Adam enlarges if ε is small.
STEPS, RANK, SCALE, EPS = 4, 2, 0.5, 0.1
GROWTH = np.array([1.0, 5.0, 1.2, 0.1])[:, None, None]  # of the gradient: makes the limiter work


def gradients(shape):
    rng = np.random.default_rng(0)
    return (GROWTH * rng.normal(size=(STEPS, *shape))).astype(np.float32)


def oracle(grads, side, limit):
    """U = αPN + (G − PPᵀG)φ with one basis for all steps, and the limiter on the second term."""
    grads, adam, last, updates = grads.astype(np.float64), Adam(eps=EPS), None, []
    P, Q = svd_bases(grads[0], RANK, side)
    for G in grads:
        R = P.T @ G @ Q
        N = adam(R)
        axis = {"left": 0, "right": 1, "both": None}[side]
        phi = np.linalg.norm(N, axis=axis, keepdims=True) / np.linalg.norm(
            R, axis=axis, keepdims=True
        )
        S = (G - P @ P.T @ G @ Q @ Q.T) * phi
        norm = np.linalg.norm(S)
        if limit is not None and last is not None and norm > limit * last:
            S *= limit * last / norm
        last = np.linalg.norm(S)
        updates.append(SCALE * P @ N @ Q.T + S)
    return np.stack(updates)


def run(side, limit, grads, *inner):
    tx = ng.chain(
        ng.low_rank_project(rank=RANK, side=side, method="svd"),
        optax.scale_by_adam(eps=EPS),
        *inner,
        ng.project_back(scale=SCALE, residual=True, norm_growth_limit=limit),
    )

    def step(state, g):
        updates, state = tx.update({"w": g}, state)
        return state, updates["w"]

    return jax.jit(lambda g: jax.lax.scan(step, tx.init({"w": g[0]}), g)[1])(jnp.asarray(grads))


@pytest.mark.parametrize("limit", [None, 1.1])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_against_numpy(side, limit):
    grads = gradients((6, 9))
    expected = oracle(grads, side, limit)
    np.testing.assert_allclose(run(side, limit, grads), expected, rtol=1e-4, atol=1e-5)
    if limit is not None:
        assert not np.allclose(expected, oracle(grads, side, None), rtol=1e-2)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_learning_rate_inside_gives_a_descending_residual(side):
    grads = gradients((6, 9))
    ascending = run(side, 1.1, grads)
    descending = run(side, 1.1, grads, optax.scale_by_learning_rate(0.1))
    np.testing.assert_allclose(descending, -0.1 * ascending, rtol=1e-4, atol=1e-6)


def test_a_warm_up_from_zero_inside_finds_the_sign_later():
    grads = gradients((6, 9))
    warm_up = optax.scale_by_learning_rate(lambda count: 0.1 * jnp.minimum(count, 1))
    updates = run("left", None, grads, warm_up)
    np.testing.assert_array_equal(updates[0], 0)
    np.testing.assert_allclose(
        updates[1:], -0.1 * oracle(grads, "left", None)[1:], rtol=1e-4, atol=1e-6
    )
