"""APOLLO against its algorithm in float64 NumPy, and what it promises besides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles.apollo import apollo
from oracles.galore import Adam
from replay import replay

import natgalore_jax as ng
import natgalore_jax._src.contrib.apollo as _apollo
from natgalore_jax._src.contrib.apollo import random_projection
from natgalore_jax._src.params.plan import PlanSettings, plan_tree

STEPS, INTERVAL, RANK, SEED = 7, 3, 2, 5
RNG = np.random.default_rng(0)
SHAPES = {"bias": (4,), "square": (5, 5), "tall": (7, 4), "wide": (4, 6)}
PARAMS = {k: RNG.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
# They grow and shrink by so much that the limit acts at some steps and not at others.
GROWTH = np.array([1.0, 1.5, 0.3, 2.0, 1.0, 4.0, 0.5], np.float32)
GRADS = {
    k: RNG.standard_normal((STEPS, *s)).astype(np.float32) * GROWTH.reshape(STEPS, *[1 for _ in s])
    for k, s in SHAPES.items()
}


def projections(params, rank, axes=None):
    """For each projected leaf its P (r, m) at every step, without batch axes."""
    plans = plan_tree(PlanSettings(rank, ng.hidden_matrices, axes), params)
    return {
        name: [
            np.asarray(random_projection(plan, SEED, t // INTERVAL, i, jnp.float32)).T
            for t in range(STEPS)
        ]
        for i, (name, plan) in enumerate(zip(sorted(params), plans, strict=True))
        if plan
    }


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("limit", [1.01, None])
def test_every_step_across_new_projections(granularity, limit):
    tx = ng.contrib.apollo_adamw(
        0.1,
        rank=RANK,
        update_interval=INTERVAL,
        eps=1e-6,
        weight_decay=0.1,
        scale=2.5,
        granularity=granularity,
        norm_growth_limit=limit,
        seed=SEED,
    )
    trajectory = replay(tx, PARAMS, GRADS)
    for name, P in projections(PARAMS, RANK).items():
        expected = apollo(
            PARAMS[name],
            GRADS[name],
            P,
            lr=0.1,
            granularity=granularity,
            scale=2.5,
            limit=limit,
            weight_decay=0.1,
            adam=Adam(eps=1e-6),
        )
        np.testing.assert_allclose(trajectory[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    plain = replay(optax.adamw(0.1, eps=1e-6, weight_decay=0.1), PARAMS, GRADS)
    np.testing.assert_allclose(trajectory["bias"], plain["bias"], rtol=1e-6)


def test_mini_is_rank_one_by_tensor_with_its_scale():
    tx = ng.contrib.apollo_mini_adamw(
        0.1, update_interval=INTERVAL, eps=1e-6, weight_decay=0.0, seed=SEED
    )
    trajectory = replay(tx, PARAMS, GRADS)
    for name, P in projections(PARAMS, 1).items():
        expected = apollo(
            PARAMS[name],
            GRADS[name],
            P,
            lr=0.1,
            granularity="tensor",
            scale=11.313708,
            adam=Adam(eps=1e-6),
        )
        np.testing.assert_allclose(trajectory[name], expected, rtol=1e-4, atol=1e-4, err_msg=name)


def test_projections_are_normal_with_variance_1_over_r_and_new_for_each_window_leaf_and_layer():
    plans = plan_tree(PlanSettings(8, True, None), {"w": jnp.zeros((2, 500, 600))})
    P, again, *others = (
        np.asarray(random_projection(plans[0], seed, window, leaf, jnp.float32))
        for seed, window, leaf in [(0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    )
    assert P.shape == (2, 500, 8)
    np.testing.assert_array_equal(P, again)
    # 8000 draws: standard errors 0.011 of the mean and 0.016 of the variance, times four.
    assert abs(P.mean() * np.sqrt(8)) < 0.045
    assert abs(P.var() * 8 - 1) < 0.065
    for other in (*others, P[::-1]):
        assert abs(np.corrcoef(P.ravel(), other.ravel())[0, 1]) < 0.045


def test_scales_estimate_those_of_adam_in_full():
    """At m ≫ r ≫ 1: √(m / r) s is Adam's own ratio of norms, up to the noise of the projection."""
    m, n, rank = 400, 500, 128
    column_sizes = 3.0 ** np.linspace(-2, 2, n)
    grads = [{"w": jnp.asarray(g * column_sizes)} for g in RNG.standard_normal((4, m, n))]
    tx = ng.contrib.scale_by_apollo(rank=rank, norm_growth_limit=None, where=True)
    adam = optax.scale_by_adam()
    state, full = tx.init(grads[0]), adam.init(grads[0])
    for g in grads:
        scaled, state = tx.update(g, state)
        steps, full = adam.update(g, full)
    expected = np.linalg.norm(steps["w"], axis=0)
    np.testing.assert_allclose(
        np.sqrt(m / rank) * np.linalg.norm(scaled["w"], axis=0), expected, rtol=0.25
    )


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_stacked_equals_separate_under_the_same_projections(granularity, monkeypatch):
    """A stack with its batch axis in the middle and two axes for its columns: (m, L, a, b)."""
    layers, m, a, b = 3, 4, 2, 5
    G = RNG.standard_normal((STEPS, m, layers, a, b)).astype(np.float32)
    G = G * GROWTH.reshape(STEPS, 1, 1, 1, 1)
    P = RNG.standard_normal((layers, m, RANK)).astype(np.float32)

    def known_projection(plan, seed, window, leaf, dtype, first):
        return jnp.asarray(P if plan.batch else jnp.asarray(P)[leaf], dtype)

    monkeypatch.setattr(_apollo, "random_projection", known_projection)
    settings = {"rank": RANK, "granularity": granularity, "where": True}
    stacked = ng.contrib.apollo_adamw(0.1, **settings, axes=ng.MatrixAxes(rows=0, cols=(2, 3)))
    separate = ng.contrib.apollo_adamw(0.1, **settings)
    of_stack = replay(stacked, {"w": np.zeros_like(G[0])}, {"w": G})["w"]
    flat = {f"{i}": G[:, :, i].reshape(STEPS, m, a * b) for i in range(layers)}
    of_layers = replay(separate, jax.tree.map(lambda g: np.zeros_like(g[0]), flat), flat)
    for i in range(layers):
        np.testing.assert_allclose(
            of_stack[:, :, i].reshape(STEPS, m, a * b), of_layers[f"{i}"], rtol=1e-5, atol=1e-6
        )


def test_update_norms_grow_by_no_more_than_the_limit():
    def growth(limit):
        tx = ng.contrib.scale_by_apollo(rank=RANK, norm_growth_limit=limit)
        state, norms = tx.init(PARAMS), []
        for t in range(STEPS):
            updates, state = tx.update(jax.tree.map(lambda g, t=t: g[t], GRADS), state)
            norms.append(float(np.linalg.norm(updates["wide"])))
        return np.array(norms[1:]) / np.array(norms[:-1])

    np.testing.assert_allclose(growth(1.05).max(), 1.05, rtol=1e-5)
    assert growth(None).max() > 1.2


def test_zero_gradients_give_zero_updates_and_leave_no_trace():
    tx = ng.contrib.scale_by_apollo(rank=RANK)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, state = tx.update(zero, tx.init(PARAMS))
    assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.all(u == 0)), updates))
    updates, _ = tx.update(PARAMS, state)
    assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.all(jnp.isfinite(u))), updates))
    assert jnp.any(updates["wide"] != 0)


def test_state_is_moments_and_norms_alone_and_the_report_shows_it():
    params = {"w": jax.ShapeDtypeStruct((3, 64, 256), jnp.bfloat16)}
    report = ng.memory_report(ng.contrib.apollo_adamw(1e-2, rank=8), params)
    (w,) = report.parameters
    assert (w.side, w.rank, w.layers) == ("left", 8, 3)
    assert (w.basis_bytes, w.inner_bytes) == (0, 3 * (2 * 8 * 256 * 2 + 4))
    assert report.alternative_state_bytes == {}
    assert "left" in str(report)
