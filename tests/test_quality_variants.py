"""Variants of the default optimizer and other texts, for the comparison of optimizers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import natgalore_jax as ng
from benchmarks.pretraining.corpora import sources_of
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


def test_texts_that_come_with_python(tmp_path):
    for name, words in {"stdlib": "def abstractmethod", "pydoc": 'The "try" statement'}.items():
        (source,) = sources_of(name, tmp_path)
        assert words in Path(source).read_text()
        assert sources_of(name, tmp_path) == (source,)
