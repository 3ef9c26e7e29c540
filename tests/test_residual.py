"""The residual of project_back and its norm-growth limiter against NumPy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles.galore import Adam, svd_bases
from replay import updates_of

import natgalore_jax as ng

# Two-sided, the first R is diagonal but for rounding errors, which Adam enlarges if ε is small.
STEPS, RANK, SCALE, EPS = 4, 2, 0.5, 0.1
GROWTH = np.array([1.0, 5.0, 1.2, 0.1])[:, None, None]  # of the gradient: makes the limiter work


def gradients(shape):
    rng = np.random.default_rng(0)
    return (GROWTH * rng.normal(size=(STEPS, *shape))).astype(np.float32)


def oracle(grads, side, limit, rule="fira", sigma=1.0, beta=0.9):
    """U = αPN + σEφ with one basis for all steps, and the limiter on the second term."""
    grads, adam, last, updates = grads.astype(np.float64), Adam(eps=EPS), None, []
    P, Q = svd_bases(grads[0], RANK, side)
    axis, c = {"left": 0, "right": 1, "both": None}[side], None
    for G in grads:
        R = P.T @ G @ Q
        N = adam(R)
        E = G - P @ P.T @ G @ Q @ Q.T
        if rule == "fira":
            phi = np.linalg.norm(N, axis=axis, keepdims=True) / np.linalg.norm(
                R, axis=axis, keepdims=True
            )
        else:
            now = np.mean(E**2, axis=axis, keepdims=True)
            if limit is not None and c is not None:
                now *= min(1.0, 10 * c.sum() / now.sum())
            c = now if c is None else beta * c + (1 - beta) * now
            phi = 1 / np.sqrt(c + 1e-4 * np.mean(G**2, axis=axis, keepdims=True))
        S = sigma * E * phi
        norm = np.linalg.norm(S)
        level = last if rule == "fira" else sigma * np.sqrt(G.size)
        if limit is not None and level is not None and norm > limit * level:
            S *= limit * level / norm
        last = np.linalg.norm(S)
        updates.append(SCALE * P @ N @ Q.T + S)
    return np.stack(updates)


def run(side, limit, grads, *inner, residual="fira", **arguments):
    tx = ng.chain(
        ng.low_rank_project(rank=RANK, side=side, method="svd"),
        optax.scale_by_adam(eps=EPS),
        *inner,
        ng.project_back(scale=SCALE, residual=residual, norm_growth_limit=limit, **arguments),
    )
    return np.stack([u["w"] for u in updates_of(tx, [{"w": g} for g in grads])[0]])


@pytest.mark.parametrize("rule", ["fira", "fisher"])
@pytest.mark.parametrize("limit", [None, 1.1])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_against_numpy(side, limit, rule):
    grads = gradients((6, 9))
    arguments = {"sigma": 0.3, "beta": 0.8}
    expected = oracle(grads, side, limit, rule, **arguments)
    decay = {"residual_decay": 0.8} if rule == "fisher" else {}
    updates = run(side, limit, grads, residual=rule, residual_scale=0.3, **decay)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)
    if limit is not None:
        assert not np.allclose(expected, oracle(grads, side, None, rule, **arguments), rtol=1e-2)


def residual_sizes(norms, **arguments):
    """Root mean squares of residual updates, σ = 1, for gradients of the given norms."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(len(norms), 24, 32)) * np.reshape(norms, (-1, 1, 1))
    tx = ng.chain(
        ng.low_rank_project(rank=2, where=True),
        ng.project_back(scale=0.0, residual="fisher", residual_scale=1.0, **arguments),
    )
    updates, _ = updates_of(tx, list(jnp.asarray(grads, jnp.float32)))
    return np.array([jnp.sqrt(jnp.mean(jnp.square(u))) for u in updates])


def test_the_limit_tames_spikes_and_recovers():
    norms = np.ones(120)
    norms[30], norms[60], norms[90:] = 1e6, 1e-6, 50.0
    sizes = residual_sizes(norms)
    # Neither the spike nor a lasting rise is followed by more than γ σ.
    assert np.all(sizes <= 1.011)
    assert sizes[30] == pytest.approx(1.01, abs=0.01)
    # The spike makes c 1.9 times as large, nine tenths of which are forgotten in 22 steps.
    assert sizes[31] > 0.65 and np.all(sizes[54:60] > 0.9)
    # The vanishing gradient has a vanishing update, and the next one its full size.
    assert sizes[60] < 1e-4 and sizes[61] > 0.9
    assert np.all(sizes[100:] > 0.9)
    unlimited = residual_sizes(norms, norm_growth_limit=None)
    assert unlimited[30] > 3 and unlimited[31] < 0.1


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_the_limit_costs_little_where_gradient_norms_vary(spread):
    norms = np.exp(spread * np.random.default_rng(1).normal(size=400))
    limited, unlimited = (residual_sizes(norms, norm_growth_limit=g) for g in (1.01, None))
    assert limited.mean() > 0.8 * unlimited.mean()


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_fisher_entries_are_one_for_each_column_that_is_kept(side):
    tx = ng.chain(ng.low_rank_project(rank=2, side=side), ng.project_back(residual="fisher"))
    state = tx.init({"w": jnp.ones((3, 6, 9)), "b": jnp.ones(9)})[-1]
    assert state.residual_fisher["w"].shape == {"left": (3, 9), "right": (3, 6), "both": (3,)}[side]
    assert isinstance(state.residual_fisher["b"], optax.MaskedNode)


def test_a_gradient_inside_the_subspace_leaves_no_residual():
    """Rounding errors must not become updates of size σ."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(STEPS, 6, 2)) @ rng.normal(size=(2, 9))
    grads[1:] = grads[0]  # The subspace is that of the first gradient.
    updates = run("left", None, grads.astype(np.float32), residual="fisher")
    P = svd_bases(grads[0], RANK, "left")[0]
    outside = updates - P @ P.T @ updates
    assert np.max(np.abs(outside)) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_rounding_of_gradients_makes_no_column_large(dtype, noise):
    """Nearly of rank one: a hundredth of the energy, or less, is outside of the subspace."""
    tx = ng.chain(
        ng.low_rank_project(rank=8, update_interval=1000),
        optax.identity(),
        ng.project_back(scale=0.0, residual="fisher", residual_scale=1.0),
    )
    rng = np.random.default_rng(0)
    leading = rng.normal(size=(64, 1)) * rng.normal(size=(1, 128))
    grads = [{"w": leading + noise * rng.normal(size=leading.shape)} for _ in range(4)]
    grads = [{"w": jnp.asarray(g["w"], dtype)} for g in grads]
    rms = np.sqrt(np.mean(np.square(updates_of(tx, grads)[0][-1]["w"], dtype=float), axis=0))
    assert rms.max() < 1.5


def test_a_gradient_that_is_not_finite_does_not_enter_the_fisher_entries():
    tx = ng.chain(ng.low_rank_project(rank=2), ng.project_back(residual="fisher"))
    good, bad = ({"w": jnp.asarray(g)} for g in gradients((6, 9))[:2])
    bad = {"w": bad["w"].at[0, 0].set(jnp.nan)}
    _, before = tx.update(good, tx.init(good))
    _, after = tx.update(bad, before)
    before, after = (state[-1].residual_fisher["w"] for state in (before, after))
    assert after[0] == before[0]  # The column of the bad entry.
    assert np.all(np.isfinite(after)) and np.all(after[1:] != before[1:])


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


def test_every_matrix_finds_its_sign_at_its_own_first_update():
    """One ascends, one descends, one has no gradient before the second step."""
    signs = jnp.array([1.0, -1.0, -1.0])[:, None, None]
    inner = optax.stateless(lambda updates, params: {"w": signs * updates["w"]})
    tx = ng.chain(ng.low_rank_project(rank=2), inner, ng.project_back(residual="fira"))
    first, second = np.random.default_rng(0).normal(size=(2, 3, 6, 9)).astype(np.float32)
    first[2] = 0
    state = tx.init({"w": jnp.asarray(first)})
    for grads, expected in (first, [1, -1, 0]), (second, [1, -1, -1]):
        updates, state = tx.update({"w": jnp.asarray(grads)}, state)
        np.testing.assert_array_equal(state[-1].direction["w"], expected)
    along = np.sum(np.asarray(updates["w"]) * second, (1, 2))
    np.testing.assert_array_equal(np.sign(along), [1, -1, -1])
