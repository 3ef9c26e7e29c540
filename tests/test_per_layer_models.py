"""Models of all kinds under per-layer updates; clipping and bfloat16."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import signature
from per_layer_model import (
    L,
    assert_same,
    batches,
    embed,
    head,
    init_params,
    layer,
    loss,
    ordinary,
    per_layer,
)
from tolerances import LOSSES

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_tied_embeddings_take_the_sum_of_both_gradients():
    tx, params = optax.adam(0.01, eps=1e-3), init_params(tied=True)
    assert_same(per_layer(tx, params, batches(4)), ordinary(tx, params, batches(4)))


def test_anything_may_pass_through_the_layers():
    """Integers, booleans and random keys have no gradient, and may change from layer to layer."""
    noise = 0.1

    def start(params, batch):
        x = embed(params, batch)
        return {"x": x, "mask": batch["x"] > 3, "key": jax.random.key(7), "number": 0}

    def noisy(w, h):
        key, own = jax.random.split(h["key"])
        x = layer(w, h["x"]) + noise * h["number"] * jax.random.normal(own, h["x"].shape)
        return {"x": jnp.where(h["mask"][..., None], x, h["x"]), "key": key} | {
            "mask": ~h["mask"],
            "number": h["number"] + 1,
        }

    def end(params, h, batch):
        return head(params, h["x"], batch) * h["number"]

    def whole(params, batch):
        h = start(params, batch)
        for i in range(L):
            h = noisy(jax.tree.map(lambda a, i=i: a[i], params["layers"]), h)
        return end(params, h, batch)

    params, batch, tx = init_params(), batches(1)[0], optax.sgd(0.1)
    train = ng.training.per_layer(tx, start, noisy, end)
    value, grads = jax.value_and_grad(whole)(params, batch)
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    new, _, metrics = train.step(params, train.init(params), batch)
    np.testing.assert_allclose(metrics.loss, value, **LOSSES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new, expected)


class Model(NamedTuple):
    outer: dict
    stack: dict


def test_the_stack_may_be_anywhere_in_any_pytree():
    params = init_params()
    layers = params.pop("layers")
    model, tx, steps = Model(params, {"blocks": layers}), optax.adam(0.01, eps=1e-3), batches(3)
    train = ng.training.per_layer(
        tx,
        lambda model, batch: embed(model.outer, batch),
        layer,
        lambda model, x, batch: head(model.outer, x, batch),
        layers=lambda model: model.stack["blocks"],
    )
    state = train.init(model)
    for batch in steps:
        model, state, metrics = train.step(model, state, batch)
    losses, *_ = ordinary(tx, init_params(), steps)
    np.testing.assert_allclose(metrics.loss, losses[-1], **LOSSES)


def norm_of(*trees):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(trees)))


@pytest.mark.parametrize("mode", ["previous", "layer"])
def test_clipping(mode):
    """Plain gradient descent with every factor computed here."""
    limit, rate, params = 0.3, 0.1, init_params()
    _, norms, actual, _ = per_layer(
        optax.sgd(rate), params, batches(3), clip_norm=limit, clip_mode=mode
    )
    expected, previous = jax.tree.map(np.asarray, params), 0.0
    for batch, norm in zip(batches(3), norms, strict=True):
        grads = jax.tree.map(np.asarray, jax.grad(loss)(expected, batch))
        np.testing.assert_allclose(norm, norm_of(grads), rtol=1e-4)
        if mode == "previous":
            factors = jax.tree.map(lambda _: 1.0, grads)
            factors = optax.tree.scale(limit / max(previous, limit), factors)
            previous = norm_of(grads)
        else:
            own = [norm_of(jax.tree.map(lambda g, i=i: g[i], grads["layers"])) for i in range(L)]
            after = limit / max(norm_of(grads["norm"], grads["head"]), limit)
            before = limit / max(norm_of(grads["embed"]), limit)
            of_layers = limit / np.maximum(own, limit)
            assert after < 1 and min(of_layers) < 1
            of_matrices = of_layers.reshape(L, 1, 1)
            factors = {
                "embed": {"table": before},
                "head": {"kernel": after},
                "norm": {"scale": after},
                "layers": {
                    "up": of_matrices,
                    "down": of_matrices,
                    "norm": {"scale": of_layers.reshape(L, 1)},
                },
            }
        expected = jax.tree.map(lambda w, c, g: w - rate * c * g, expected, factors, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


def test_bfloat16_parameters_rounded_at_random_as_in_the_ordinary_step():
    def apply_updates(params, updates, state):
        return ng.training.apply_updates_stochastic(params, updates, optax.tree.get(state, "count"))

    tx = optax.scale_by_schedule(lambda count: -0.1)
    params = optax.tree.cast(init_params(), jnp.bfloat16)
    batch = batches(1)[0]
    train = ng.training.per_layer(tx, embed, layer, head, apply_updates=apply_updates)
    grads = jax.jit(jax.grad(loss))(params, batch)
    updates, _ = tx.update(grads, tx.init(params))
    expected = apply_updates(params, updates, tx.init(params))
    actual, _, _ = train.step(jax.tree.map(jnp.copy, params), train.init(params), batch)
    different = jax.tree.map(lambda a, b: jnp.mean(a != b), actual, expected)
    assert max(map(float, jax.tree.leaves(different))) < 0.05  # where gradients differ in a bit
    assert signature(actual) == signature(params)
