"""Saving and restoring a state between two refreshes, inside of an accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from replay import through_orbax

import natgalore_jax as ng

SHAPES = {"w": (8, 12), "layers": (2, 6, 8), "b": (8,)}


def optimizer():
    inner = optax.chain(ng.woodbury_natural_gradient(history=3, damping=0.1), optax.scale_by_adam())
    return ng.chain(
        ng.low_rank_project(rank=2, update_interval=4),
        optax.MultiSteps(inner, 2),
        ng.project_back(),
        optax.scale(-0.1),
    )


@jax.jit
def step(params, state, t):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), t), len(params))
    grads = {
        name: w + jax.random.normal(key, w.shape)
        for key, (name, w) in zip(keys, sorted(params.items()), strict=True)
    }
    updates, state = optimizer().update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(params, state, first, end):
    for t in range(first, end):
        params, state = step(params, state, t)
    return params, state


def test_a_restored_state_continues_bit_identically(tmp_path):
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    # Seven steps: three after the refresh at step 4, and one into an accumulation.
    halfway = train(params, optimizer().init(params), 0, 7)
    abstract = jax.eval_shape(lambda p: (p, optimizer().init(p)), params)
    restored = through_orbax(halfway, abstract, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, train(*restored, 7, 12), train(*halfway, 7, 12))
