"""The default optimizer put together from its parts is the default optimizer."""

import jax
import jax.numpy as jnp
import numpy as np

import natgalore_jax as ng
from benchmarks.pretraining.variants import recipe


def test_the_recipe_in_parts_is_the_default():
    params = {"w": jax.random.normal(jax.random.key(0), (24, 32)), "b": jnp.zeros(5)}
    whole = ng.natural_galore_adamw(0.02, rank=4, update_interval=2, weight_decay=0.0)
    optimizers = whole, recipe(0.02, rank=4, update_interval=2, steps=9)
    states = [tx.init(params) for tx in optimizers]
    for step in range(3):
        grads = jax.tree.map(lambda p, s=step: jnp.cos(7 * p + s), params)
        updates = []
        for i, tx in enumerate(optimizers):
            update, states[i] = tx.update(grads, states[i], params)
            updates.append(update)
        jax.tree.map(np.testing.assert_array_equal, *updates)
