"""Variants of the default optimizer and other texts, for the comparison of optimizers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgalore_jax as ng
from benchmarks.pretraining.corpora import sources_of
from benchmarks.pretraining.methods import METHODS, Method, clipped
from benchmarks.pretraining.variants import recipe
from examples.common.errors import ConfigError


def test_the_recipe_in_parts_is_the_default():
    params = {"w": jax.random.normal(jax.random.key(0), (24, 32)), "b": jnp.zeros(5)}
    whole = ng.natural_galore_adamw(0.02, rank=4, update_interval=2, weight_decay=0.0)
    optimizers = whole, recipe(0.02, rank=4, update_interval=2)
    states = [tx.init(params) for tx in optimizers]
    for step in range(3):
        grads = jax.tree.map(lambda p, s=step: jnp.cos(7 * p + s), params)
        updates = []
        for i, tx in enumerate(optimizers):
            update, states[i] = tx.update(grads, states[i], params)
            updates.append(update)
        jax.tree.map(np.testing.assert_array_equal, *updates)


def test_a_method_with_clipping_is_clipped_as_the_default_is():
    """At rank one, where one power iteration is exact from both starts, factored and dense."""
    u, v = jax.random.normal(jax.random.key(0), (24, 1)), jax.random.normal(jax.random.key(1), 32)
    params = {"mlp": u * v, "b": jnp.ones(5)}
    without = Method("", recipe, {"rank": 4, "singular_limit": None})
    whole = ng.natural_galore_adamw(0.02, rank=4, weight_decay=0.0)
    for method in (without, clipped(without)):
        tx = method.factory(learning_rate=lambda step: 0.02, **method.fixed)
        states = [whole.init(params), tx.init(params)]
        for step in range(3):
            grads = jax.tree.map(lambda p, s=step: (2 + s) * p, params)
            expected, states[0] = whole.update(grads, states[0], params)
            found, states[1] = tx.update(grads, states[1], params)
            # Clipping leaves a tenth of each number: its rounding is ten times as large.
            difference = jnp.linalg.norm(found["mlp"] - expected["mlp"])
            close = difference < 1e-3 * jnp.linalg.norm(expected["mlp"])
            assert close == (method is not without)
            np.testing.assert_allclose(found["b"], expected["b"], rtol=1e-5)


def test_clipping_refuses_weight_decay():
    with pytest.raises(ConfigError, match="weight decay"):
        clipped(METHODS["racs"]).factory(lambda step: 0.1, weight_decay=0.1)


def test_texts_that_come_with_python(tmp_path):
    for name, words in {"stdlib": "def abstractmethod", "pydoc": 'The "try" statement'}.items():
        (source,) = sources_of(name, tmp_path)
        assert words in Path(source).read_text()
        assert sources_of(name, tmp_path) == (source,)
