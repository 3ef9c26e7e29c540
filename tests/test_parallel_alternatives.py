"""Optimizers of contrib with sharded parameters on eight simulated devices: the numbers of one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

SHAPES = {"down": (32, 16), "layers": (8, 16, 24), "up": (16, 32)}
OPTIMIZERS = {
    "apollo": lambda: ng.contrib.apollo_adamw(0.05, rank=4, update_interval=2),
    "ldadamw": lambda: ng.contrib.ldadamw(0.05, rank=4, error_feedback=True, eps=1e-4),
    "alice": lambda: ng.contrib.alice_adamw(
        0.05, rank=4, update_interval=2, leading=2, eps=1e-3, scale=1.0
    ),
    "racs": lambda: ng.contrib.racs_adamw(0.05, scale=1.0),
    "scale": lambda: ng.contrib.scale_sgd(0.05, head={"down": False, "layers": True, "up": True}),
}


def random_tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: np.asarray(jax.random.normal(key, shape))
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


@pytest.mark.parametrize(
    ("axis_type", "axis"), [(AxisType.Auto, -1), (AxisType.Explicit, 0), (AxisType.Explicit, -1)]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_parameters(name, axis_type, axis):
    tx, params = OPTIMIZERS[name](), random_tree(0)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    update = jax.jit(tx.update)

    def sharding(x):
        return NamedSharding(
            mesh, jax.P(*("model" if a == axis % x.ndim else None for a in range(x.ndim)))
        )

    shardings = jax.tree.map(sharding, params)
    expected_state = tx.init(params)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, shardings)
        state = jax.jit(tx.init)(sharded)
    for t in range(3):
        grads = random_tree(t + 1)
        expected, expected_state = update(grads, expected_state, params)
        with jax.set_mesh(mesh):
            before = jax.tree.map(jax.typeof, state)
            actual, state = update(jax.device_put(grads, shardings), state, sharded)
            assert jax.tree.map(jax.typeof, state) == before
        for key in SHAPES:
            assert actual[key].sharding.is_equivalent_to(shardings[key], actual[key].ndim)
            np.testing.assert_allclose(
                np.asarray(actual[key]), expected[key], rtol=1e-3, atol=1e-4, err_msg=key
            )
    assert jnp.any(expected["up"] != 0)


@pytest.mark.parametrize("name", ["ldadamw", "alice"])
def test_bases_follow_their_parameters(name):
    """The rows of "up" and of the layers are projected, the columns of "down"."""
    mesh = jax.make_mesh((8,), ("x",))
    specs = {"down": jax.P(None, "x"), "layers": jax.P("x"), "up": jax.P("x")}
    params = {
        key: jax.ShapeDtypeStruct(
            SHAPES[key], jnp.float32, sharding=NamedSharding(mesh, specs[key])
        )
        for key in SHAPES
    }
    found = ng.training.state_shardings(OPTIMIZERS[name](), params)[0].basis
    expected = {"down": jax.P("x", None), "layers": jax.P("x", None, None), "up": jax.P("x", None)}
    assert {key: sharding.spec for key, sharding in found.items()} == expected
