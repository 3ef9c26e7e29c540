"""Flax NNX: optax over the pure state of a model, and nnx.Optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from composed import composed_adamw
from flax import nnx


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 24, rngs=rngs)
        self.down = nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


def loss(model, x):
    return jnp.mean((model(x) - jnp.roll(x, 1, -1)) ** 2)


X = jax.random.normal(jax.random.key(1), (64, 8))
SETTINGS = {"rank": 4, "update_interval": 5, "scale": 1.0}


def train_functionally(tx, steps):
    graphdef, params = nnx.split(MLP(nnx.Rngs(0)))
    params = nnx.as_pure(params)
    state = tx.init(params)
    assert optax.tree.get(state, "mu")["up"]["kernel"].shape == (4, 24)
    assert optax.tree.get(state, "mu")["up"]["bias"].shape == (24,)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p), X))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses


def test_optax_over_the_pure_state_trains():
    tx = composed_adamw("stored", 0.03, history=3, damping=0.1, damping_mode="relative", **SETTINGS)
    losses = train_functionally(tx, 30)
    assert losses[-1] < 0.5 * losses[0]


def test_nnx_optimizer_gives_the_same_as_optax_over_the_pure_state():
    tx = composed_adamw("stored", 0.03, history=3, residual="fira", **SETTINGS)
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model, X)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(12)]
    np.testing.assert_allclose(losses, train_functionally(tx, 12), rtol=1e-4)
