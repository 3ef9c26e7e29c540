"""RACS against its algorithm in float64 NumPy, and what it promises besides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles.racs import fixed_point, racs
from replay import replay

import natgalore_jax as ng
from natgalore_jax._src.contrib import racs as _racs
from natgalore_jax._src.params.plan import PlanSettings, plan_tree

STEPS = 8
RNG = np.random.default_rng(0)
SHAPES = {"bias": (4,), "square": (5, 5), "tall": (7, 4), "wide": (4, 6)}
PARAMS = {k: RNG.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
# They grow and shrink by so much that the limit acts at some steps and not at others.
GROWTH = np.array([1.0, 1.5, 0.1, 2.0, 1.0, 4.0, 0.5, 9.0], np.float32)
GRADS = {
    k: RNG.standard_normal((STEPS, *s)).astype(np.float32) * GROWTH.reshape(STEPS, *[1 for _ in s])
    for k, s in SHAPES.items()
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("limit", [1.01, None])
@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_every_step(limit, factor):
    """The steps do not depend on the size of the loss."""
    tx = ng.contrib.racs_adamw(
        0.1, decay=0.8, scale=0.5, norm_growth_limit=limit, weight_decay=0.1, eps=1e-6
    )
    trajectory = replay(tx, PARAMS, jax.tree.map(lambda g: g * np.float32(factor), GRADS))
    right = {"lr": 0.1, "beta": 0.8, "alpha": 0.5, "gamma": limit, "weight_decay": 0.1}
    wrong = [{"beta": 0.81}, {"alpha": 0.51}, {"gamma": 1.03}, {"steps": 1}, {"weight_decay": 0.11}]
    for name in ("square", "tall", "wide"):
        expected = racs(PARAMS[name], GRADS[name], **right)
        np.testing.assert_allclose(trajectory[name], expected, **TOLERANCE, err_msg=name)
        for change in wrong:
            other = racs(PARAMS[name], GRADS[name], **right | change)
            assert not np.allclose(trajectory[name], other, **TOLERANCE), change
    if factor == 1.0:
        plain = replay(optax.adamw(0.1, eps=1e-6, weight_decay=0.1), PARAMS, GRADS)
        np.testing.assert_allclose(trajectory["bias"], plain["bias"], rtol=1e-5, atol=1e-6)


def test_the_scales_are_singular_vectors_of_the_squares():
    """As proposition 3 says, after many iterations; their product is the best of rank one."""
    G = GRADS["wide"][0].astype(np.float64)
    (plan,) = plan_tree(PlanSettings(None, True, None), {"w": jnp.zeros(G.shape)})
    q, s = (
        np.asarray(x, np.float64) for x in _racs.fixed_point(plan, jnp.asarray(G, jnp.float32), 50)
    )
    U, sigma, Vt = np.linalg.svd(G**2)
    np.testing.assert_allclose(np.outer(q, s), sigma[0] * np.outer(U[:, 0], Vt[0]), rtol=1e-4)
    S, Q = fixed_point(G, 5)
    few = _racs.fixed_point(plan, jnp.asarray(G, jnp.float32), 5)
    np.testing.assert_allclose(few[0], Q, rtol=1e-4)
    np.testing.assert_allclose(few[1], S, rtol=1e-4)


def test_update_norms_grow_by_no_more_than_the_limit():
    tx = ng.contrib.scale_by_racs(norm_growth_limit=1.05)
    state, norms = tx.init(PARAMS), []
    for t in range(STEPS):
        updates, state = tx.update(jax.tree.map(lambda g, t=t: g[t], GRADS), state)
        norms.append(float(np.linalg.norm(updates["wide"])))
    np.testing.assert_allclose(max(np.divide(norms[1:], norms[:-1])), 1.05, rtol=1e-5)


def test_zeros_give_zero_updates_and_are_left_again():
    tx = ng.contrib.scale_by_racs()
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, state = tx.update(zero, tx.init(PARAMS))
    assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.all(u == 0)), updates))
    half = {**PARAMS, "wide": jnp.asarray(PARAMS["wide"]).at[1].set(0.0).at[:, 2].set(0.0)}
    for _ in range(2):
        updates, state = tx.update(half, state)
    assert jnp.all(jnp.isfinite(updates["wide"]))
    np.testing.assert_array_equal(updates["wide"] == 0, half["wide"] == 0)


# Of 3e38 the scales of the columns alone overflow.
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_gradient_that_is_not_finite_leaves_the_state_of_its_matrix(bad):
    tx = ng.contrib.scale_by_racs()
    layers = jnp.asarray(RNG.standard_normal((2, 4, 6)), jnp.float32)
    _, before = tx.update({"w": layers}, tx.init({"w": layers}))
    updates, after = tx.update({"w": layers.at[0, 1, 2].set(bad)}, before)
    assert not jnp.all(jnp.isfinite(updates["w"][0])) and jnp.all(jnp.isfinite(updates["w"][1]))
    for old, new in zip(before[1:], after[1:], strict=True):
        np.testing.assert_array_equal(old["w"][0], new["w"][0])


def test_state_is_a_number_a_row_and_a_column_and_a_norm_and_the_report_shows_it():
    params = {
        "w": jax.ShapeDtypeStruct((3, 64, 256), jnp.bfloat16),
        "lm_head": jax.ShapeDtypeStruct((64, 512), jnp.bfloat16),
    }
    report = ng.memory_report(ng.contrib.racs_adamw(1e-2), params)
    state_bytes = {p.path: p.inner_bytes for p in report.parameters}
    assert state_bytes == {"w": 3 * 4 * (64 + 256 + 1), "lm_head": 2 * 2 * 64 * 512}
    assert report.shared_bytes == 4  # Adam's count


@pytest.mark.parametrize(
    "tx", [ng.contrib.scale_by_racs(), ng.contrib.scale_by_apollo(rank=2)], ids=["racs", "apollo"]
)
def test_the_first_step_has_a_derivative(tx):
    """The limit on spikes, which has no level yet, divides nothing by zero."""
    G, target = (RNG.standard_normal((4, 6)) for _ in range(2))

    def loss(size):
        grads = {"w": G + size * target}
        updates, _ = tx.update(grads, tx.init(grads))
        return jnp.sum(updates["w"] * target)

    forward, reverse = jax.jacfwd(loss)(0.3), jax.jacrev(loss)(0.3)
    np.testing.assert_allclose(reverse, forward, rtol=1e-3)
    assert abs(forward) > 1
