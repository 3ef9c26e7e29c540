"""Finite gradients whose squares overflow float32: updates and states stay usable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng

RNG = np.random.default_rng(0)
SHAPES = {"mlp": (16, 24), "embed": (40, 16), "b": (16,)}
_project = {"rank": 4, "update_interval": 2}


def _gradients(size=1.0):
    return {
        k: jnp.asarray(size * RNG.uniform(-3, 3, shape), jnp.float32) for k, shape in SHAPES.items()
    }


def _inside(*inner, residual="none", **closer):
    return ng.chain(
        ng.low_rank_project(**_project),
        *inner,
        ng.project_back(residual=residual, singular_limit=0.2, **closer),
    )


FACTORIES = {
    "default": lambda: ng.natural_galore_adamw(0.1, **_project),
    "lean": lambda: ng.lean_natural_galore_adamw(0.1, **_project),
    "history": lambda: ng.chain(ng.natural_galore(**_project), optax.scale_by_adam()),
    "fira": lambda: _inside(residual="fira"),
    "fisher": lambda: _inside(optax.trace(0.9), residual="fisher", singular_values=3),
    "no limit": lambda: _inside(residual="fira", norm_growth_limit=None),
    "compact": lambda: _inside(ng.compact_natural_gradient(), residual="fira"),
    "alice": lambda: ng.contrib.scale_by_alice(rank=4),
    "racs": lambda: ng.contrib.scale_by_racs(),
    "apollo": lambda: ng.contrib.scale_by_apollo(rank=4),
    "ldadam": lambda: ng.contrib.scale_by_ldadam(rank=4),
    "ldadam, fed back": lambda: ng.contrib.scale_by_ldadam(rank=4, error_feedback=True),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_updates_stay_finite_at_a_spike_and_after_it(name):
    tx = FACTORIES[name]()
    update = jax.jit(tx.update)
    params = _gradients()
    for spikes in ((1e19, 1.0, 1.0), (1.0, 1e30, 1.0, 1.0)):
        state = tx.init(params)
        for size in spikes:
            updates, state = update(_gradients(size), state, params)
            for key, x in updates.items():
                assert np.all(np.isfinite(x)), (size, key)
        if name in ("fira", "no limit"):  # a state without Adam's squares
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "storage", [{"min_size": 1}, {"min_size": 10**6}, {"min_size": 1, "factored": True}]
)
def test_adam_in_8_bits_has_updates_of_one(storage):
    """Adam's update by a constant gradient is its sign."""
    g = {"w": jnp.asarray(1e30 * RNG.choice([-1.0, 1.0], (64, 72)), jnp.float32)}
    tx = ng.scale_by_adam_8bit(**storage)
    state = tx.init(g)
    for _ in range(4):
        updates, state = tx.update(g, state)
        # A second moment in 8 bits has an error of at most a sixteenth.
        np.testing.assert_allclose(updates["w"], jnp.sign(g["w"]), rtol=0.07)
    for bad in (jnp.inf, jnp.nan):
        updates, _ = tx.update({"w": g["w"].at[0, 0].set(bad)}, state)
        assert not np.isfinite(updates["w"][0, 0])


@pytest.mark.parametrize("dtype", [None, jnp.float16, "int8"])
def test_a_history_has_the_spike_scaled_down(dtype):
    tx = ng.woodbury_natural_gradient(history=3, damping=0.1, history_dtype=dtype)
    spike, g = jnp.asarray(RNG.standard_normal((2, 12)), jnp.float32)
    updates, state = tx.update(1e30 * spike, tx.init(spike))
    cosine = jnp.vdot(updates, spike) / jnp.linalg.norm(updates) / jnp.linalg.norm(spike)
    np.testing.assert_allclose(cosine, 1.0, rtol=1e-4)
    updates, _ = tx.update(g, state)

    largest = 1e12 if dtype is not jnp.float16 else 2.0**15
    h = np.stack([largest * spike / np.max(np.abs(spike)), g], 1).astype(np.float64)
    lam = 0.1 * np.trace(h.T @ h) / 2
    expected = np.linalg.solve(lam * np.eye(12) + h @ h.T, h[:, 1])
    np.testing.assert_allclose(updates, expected, rtol=0.02, atol=0.02 * np.max(np.abs(expected)))


def test_clipping_of_one_layer_makes_an_overflowing_gradient_zero():
    params = {"layers": {"w": jnp.ones((2, 4, 4))}, "head": jnp.ones((4,))}
    train = ng.training.per_layer(
        optax.sgd(1.0),
        embed=lambda params, batch: batch,
        layer=lambda layer, x: x + x @ layer["w"],
        head=lambda params, x, batch: 1e25 * jnp.mean(x @ params["head"]),
        clip_norm=1.0,
        clip_mode="layer",
    )
    before = jax.tree.map(np.asarray, params)
    params, _, metrics = train.step(params, train.init(params), jnp.ones((3, 4)))
    assert np.isinf(metrics.grad_norm)
    jax.tree.map(np.testing.assert_array_equal, params, before)
