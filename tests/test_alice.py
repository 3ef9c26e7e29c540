"""Alice against its algorithms in float64 NumPy, and what it promises besides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles.alice import alice
from replay import replay

import natgalore_jax as ng
from natgalore_jax._src.contrib.alice import _keys
from natgalore_jax._src.contrib.alice_kernels import leading_kept, sampled
from natgalore_jax._src.params.plan import PlanSettings, plan_tree

STEPS, INTERVAL, RANK, LEADING, SEED = 10, 4, 3, 2, 5
RNG = np.random.default_rng(0)
# A shared signal, so that successive subspaces overlap as those of a training run do, and
# eigenvalues that are apart.
SIGNAL = RNG.standard_normal((6, RANK)) * [4.0, 2.0, 1.0] @ RNG.standard_normal((RANK, 9))
# They grow and shrink by so much that the limit acts at some steps and not at others.
GROWTH = np.array([1.0, 1.5, 0.3, 2.0, 1.0, 4.0, 0.5, 3.0, 1.0, 2.0]).reshape(STEPS, 1, 1)
G = (GROWTH * (SIGNAL + RNG.standard_normal((STEPS, 6, 9)))).astype(np.float32)
W = RNG.standard_normal((6, 9)).astype(np.float32)
SETTINGS = {"rank": RANK, "leading": LEADING, "b1": 0.8, "b2": 0.85, "b3": 0.95, "eps": 1e-6}
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def flip(x):
    return np.swapaxes(x, -1, -2)


def chosen(params, rank=RANK, leading=LEADING):
    """For each projected leaf what a switch would draw at every step."""
    plans = plan_tree(PlanSettings(rank, ng.hidden_matrices, None), params)
    draws = {}
    for i, (name, plan) in enumerate(zip(sorted(params), plans, strict=True)):
        if plan:
            m = min(plan.mode_sizes)
            keys = [_keys(plan, SEED, jnp.int32(t), i)[0] for t in range(STEPS)]
            number = rank - leading_kept(m, rank, leading)
            draws[name] = [np.asarray(sampled(key, m - rank, number)) for key in keys]
    return draws


@pytest.mark.parametrize("limit", [1.01, None])
@pytest.mark.parametrize("b3", [0.95, 0.0])
def test_every_step_across_switches(b3, limit):
    tx = ng.contrib.alice_adamw(
        0.1,
        **SETTINGS | {"b3": b3},
        update_interval=INTERVAL,
        scale=0.5,
        compensation_scale=0.7,
        norm_growth_limit=limit,
        weight_decay=0.0,
        seed=SEED,
    )
    bias = RNG.standard_normal((STEPS, 6)).astype(np.float32)
    params = {"bias": bias[0], "tall": flip(W), "wide": W}
    trajectory = replay(tx, params, {"bias": bias, "tall": flip(G), "wide": G})
    draws = chosen(params)
    right = SETTINGS | {
        "b3": b3,
        "lr": 0.1,
        "interval": INTERVAL,
        "alpha": 0.5,
        "alpha_c": 0.7,
        "gamma": limit,
    }
    np.testing.assert_allclose(trajectory["wide"], alice(W, G, draws["wide"], **right), **TOLERANCE)
    np.testing.assert_allclose(
        flip(trajectory["tall"]), alice(W, G, draws["tall"], **right), **TOLERANCE
    )
    wrong = [{"b1": 0.82}, {"b2": 0.87}, {"alpha": 0.51}, {"alpha_c": 0.72}, {"interval": 5}]
    wrong += [{"gamma": 1.1 if limit else 1.01}, {"eps": 0.1}]
    wrong += [{"b3": 0.5 if b3 else 0.9}]
    for change in wrong:
        other = alice(W, G, draws["wide"], **right | change)
        assert not np.allclose(trajectory["wide"], other, **TOLERANCE), change
    assert not np.allclose(
        trajectory["wide"], alice(W, G, draws["wide"][1:] + draws["wide"][:1], **right), **TOLERANCE
    )
    plain = replay(optax.adam(0.1, eps=1e-6), {"b": bias[0]}, {"b": bias})
    np.testing.assert_allclose(trajectory["bias"], plain["b"], rtol=1e-5, atol=1e-6)


def test_the_layers_of_a_stack_draw_for_themselves_and_at_random():
    (plan,) = plan_tree(PlanSettings(2, True, None), {"w": jnp.zeros((50, 6, 8))})
    draws = {
        tuple(np.asarray(sampled(key, 20, 3)))
        for count in (0, 1)
        for leaf in (0, 1)
        for key in _keys(plan, SEED, jnp.int32(count), leaf)
    }
    assert all(len(set(draw)) == 3 for draw in draws)
    assert len(draws) > 190  # of 200, and 6840 are possible
    frequencies = np.bincount([i for draw in draws for i in draw], minlength=20)
    assert frequencies.min() > 10  # 30 on average, and a standard deviation of 5


def test_the_basis_is_orthonormal_and_has_the_leading_eigenvectors():
    tx = ng.contrib.scale_by_alice(
        rank=4, leading=2, update_interval=2, b3=0.0, seed=SEED, where=True
    )
    signal = jnp.asarray(SIGNAL, jnp.float32)
    state = tx.init({"w": signal})
    U, values, _ = np.linalg.svd(SIGNAL)
    bases = []
    for _ in range(6):
        _, state = tx.update({"w": signal}, state)
        P = np.asarray(state.basis["w"])
        np.testing.assert_allclose(P.T @ P, np.eye(4), atol=1e-5)
        bases.append(P)
    # The first basis is exact; a later one is as near as one power step of its start takes it.
    np.testing.assert_allclose(
        bases[0][:, :2] @ bases[0][:, :2].T, U[:, :2] @ U[:, :2].T, atol=1e-4
    )
    assert not np.any(np.all(bases[1] == bases[0], axis=0))  # step 2 has a switch
    np.testing.assert_array_equal(bases[2], bases[1])  # step 3 has none
    assert values[0] > values[1]


def test_so_many_eigenvectors_stay_that_the_complement_has_the_others():
    assert leading_kept(512, 128, 40) == 40
    assert leading_kept(6, 4, 1) == 2  # the complement has two
    assert leading_kept(6, 6, 1) == 6
    assert leading_kept(512, 128, 200) == 128
    assert leading_kept(512, 128, None) == 40 and leading_kept(2048, 512, None) == 160
    tx = ng.contrib.scale_by_alice(rank=6, leading=1, where=True)
    updates, _ = tx.update({"w": jnp.asarray(G[0])}, tx.init({"w": jnp.asarray(W)}))
    assert jnp.all(jnp.isfinite(updates["w"]))


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_first_gradient_that_is_zero_or_not_finite_makes_no_basis(bad):
    tx = ng.contrib.scale_by_alice(rank=RANK, leading=LEADING, update_interval=100)
    state = tx.init({"w": jnp.zeros((2, 6, 9))})
    layers = jnp.stack([jnp.full((6, 9), bad), jnp.asarray(G[0])])
    updates, state = tx.update({"w": layers}, state)
    assert not jnp.any(state.basis["w"][0]) and jnp.all(jnp.isfinite(updates["w"][1]))
    if bad == 0.0:
        assert not jnp.any(updates["w"][0])
    before = state.basis["w"][1]
    _, state = tx.update({"w": jnp.asarray(G[:2])}, state)
    P = state.basis["w"][0]
    np.testing.assert_allclose(P.T @ P, np.eye(RANK), atol=1e-5)
    np.testing.assert_array_equal(state.basis["w"][1], before)


def test_compensations_grow_by_no_more_than_the_limit():
    tx = ng.contrib.scale_by_alice(rank=RANK, leading=LEADING, norm_growth_limit=1.05)
    state, norms = tx.init({"w": jnp.asarray(W)}), []
    for g in G:
        _, state = tx.update({"w": jnp.asarray(g)}, state)
        norms.append(float(state.residual_norm["w"]))
    np.testing.assert_allclose(max(np.divide(norms[1:], norms[:-1])), 1.05, rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_basis_does_not_depend_on_the_size_of_the_gradient(factor):
    tx = ng.contrib.scale_by_alice(rank=RANK, leading=LEADING, update_interval=2)
    bases = []
    for f in (1.0, factor):
        state = tx.init({"w": jnp.asarray(W)})
        for g in G[:4]:
            _, state = tx.update({"w": jnp.asarray(g * np.float32(f))}, state)
        bases.append(np.asarray(state.basis["w"]))
    np.testing.assert_allclose(*bases, atol=1e-3)


def test_the_state_is_what_the_paper_counts_and_the_report_shows_it():
    params = {"w": jax.ShapeDtypeStruct((3, 64, 256), jnp.bfloat16)}
    for b3, tracked in ((0.999, 8 * 8), (0.0, 0)):
        report = ng.memory_report(ng.contrib.alice_adamw(1e-2, rank=8, b3=b3), params)
        (w,) = report.parameters
        assert (w.side, w.rank, w.layers) == ("left", 8, 3)
        assert w.state_bytes == 3 * (2 * (64 * 8 + 2 * 8 * 256) + 4 * (tracked + 256 + 1))
        assert report.alternative_state_bytes == {}
