"""Flax NNX: optax over the pure state of a model, and nnx.Optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from flax import nnx
from jax.sharding import AxisType

import natgalore_jax as ng


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


@nnx.jit
def nnx_step(model, optimizer):
    value, grads = nnx.value_and_grad(loss)(model, X)
    optimizer.update(model, grads)
    return value


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

    losses = [float(nnx_step(model, optimizer)) for _ in range(12)]
    np.testing.assert_allclose(losses, train_functionally(tx, 12), rtol=1e-4)


class ShardedMLP(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        columns = nnx.with_partitioning(init, (None, "model"))
        rows = nnx.with_partitioning(init, ("model", None))
        self.up = nnx.Linear(8, 24, kernel_init=columns, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(24, 8, kernel_init=rows, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(self.norm(x))))


def test_metadata_of_the_state_is_that_of_its_own_arrays():
    """And the steps are those without metadata."""
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])
    tx = ng.natural_galore_adamw(1e-2, rank=3, update_interval=5)

    with jax.set_mesh(mesh):
        model, losses = ShardedMLP(nnx.Rngs(0)), []
        optimizer = nnx.Optimizer(model, ng.training.for_nnx(tx), wrt=nnx.Param)
        state = nnx.state(optimizer, nnx.optimizer.OptState)
        jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))  # as Tunix does
        mu = optax.tree.get(optimizer.opt_state, "mu")
        assert mu["up"]["kernel"].get_value().sharding.spec == jax.P(None, "model")
        assert mu["down"]["kernel"].get_metadata("out_sharding") == jax.P("model", None)
        basis = optax.tree.get(optimizer.opt_state, "basis")
        assert basis[0]["up"]["kernel"].get_metadata("out_sharding") == jax.P("model", None)
        losses = [float(nnx_step(model, optimizer)) for _ in range(8)]
    with nnx.use_eager_sharding(False):
        model = ShardedMLP(nnx.Rngs(0))
    # Parameters on no mesh leave the state alone.
    optimizer = nnx.Optimizer(model, ng.training.for_nnx(tx), wrt=nnx.Param)
    assert (
        "out_sharding"
        not in optax.tree.get(optimizer.opt_state, "mu")["up"]["kernel"].get_metadata()
    )
    np.testing.assert_allclose(
        losses, [float(nnx_step(model, optimizer)) for _ in range(8)], rtol=1e-4
    )


def test_an_abstract_state_has_the_shardings_that_are_given():
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])
    shapes = nnx.as_pure(nnx.eval_shape(lambda: nnx.state(MLP(nnx.Rngs(0)), nnx.Param)))
    tx = ng.training.for_nnx(
        ng.galore_adamw(1e-2, rank=3), ng.training.longer_side_shardings(shapes, mesh)
    )
    optimizer = nnx.eval_shape(lambda: nnx.Optimizer(MLP(nnx.Rngs(0)), tx, wrt=nnx.Param))
    mu = optax.tree.get(optimizer.opt_state, "mu")
    assert mu["up"]["kernel"].get_metadata("out_sharding") == jax.P(None, "model")


class Stacked(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((3, 8, 12)))
        self.q_bias = nnx.Param(jnp.ones((3, 24)))  # of stacked layers


@pytest.mark.parametrize("where", [ng.hidden_matrices, lambda path, leaf: str(path) == "w"])
def test_names_are_the_same_in_a_state_of_variables_and_in_its_values(where):
    """nnx.Optimizer gives init the variables, and update the values."""
    model, tx = Stacked(), ng.galore_adamw(1e-2, rank=4, where=where)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m.w[...] ** 2 + m.q_bias[0, 0]))(model))
    basis = jax.tree.leaves(optax.tree.get(nnx.as_pure(optimizer.opt_state), "basis"))
    assert [x.shape for x in basis] == [(3, 8, 4)]
