"""Data parallelism and sharded parameters on eight simulated devices: the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from jax.sharding import AxisType, NamedSharding
from tolerances import PARAMETERS

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

DEVICES, STEPS = 8, 5
SHAPES = {"up": (16, 32), "down": (32, 16), "bias": (16,)}


SETTINGS = {"rank": 4, "update_interval": 3}
OPTIMIZERS = {
    "compact": lambda: ng.natural_galore_adamw(0.0125, **SETTINGS),
    "history": lambda: composed_adamw(
        "stored", 0.0125, **SETTINGS, history=2, damping=0.1, residual="fira"
    ),
}
CURRENT = {}


@pytest.fixture(params=OPTIMIZERS)
def kind(request, monkeypatch):
    monkeypatch.setitem(CURRENT, "kind", request.param)


of_each_kind = pytest.mark.usefixtures("kind")


def optimizer():
    return OPTIMIZERS[CURRENT["kind"]]()


def loss(params, batch):
    hidden = jnp.tanh(batch @ params["up"])
    return jnp.mean((hidden @ params["down"] + params["bias"] - jnp.roll(batch, 1, -1)) ** 2)


def start():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        name: 0.3 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    return params, jax.random.normal(jax.random.key(1), (16, 16))


@functools.cache
def on_one_device(kind):
    tx = OPTIMIZERS[kind]()

    @jax.jit
    def run(params, batch):
        state = tx.init(params)
        for _ in range(STEPS):
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            params = optax.apply_updates(params, updates)
        return params

    return jax.tree.map(np.asarray, run(*start()))


def assert_same_as_on_one_device(params):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a), e, **PARAMETERS),
        params,
        on_one_device(CURRENT["kind"]),
    )


def apply(params, state, grads):
    updates, state = optimizer().update(grads, state, params)
    return optax.apply_updates(params, updates), state


@of_each_kind
def test_pmap():
    params, batch = start()
    batches = batch.reshape(DEVICES, -1, batch.shape[-1])
    state = optimizer().init(params)
    replicate = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * DEVICES))
    params, state = replicate(params), replicate(state)
    step = jax.pmap(
        lambda params, state, batch: apply(
            params, state, jax.lax.pmean(jax.grad(loss)(params, batch), "data")
        ),
        axis_name="data",
    )
    for _ in range(STEPS):
        params, state = step(params, state, batches)
    for device in (0, DEVICES - 1):
        assert_same_as_on_one_device(jax.tree.map(lambda x, d=device: x[d], params))


@of_each_kind
def test_shard_map():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))

    def step(params, state, batch):
        grads = jax.grad(lambda p: jax.lax.pmean(loss(p, batch), "data"))(params)
        return apply(params, state, grads)

    step = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(jax.P(), jax.P(), jax.P("data")),
            out_specs=(jax.P(), jax.P()),
        )
    )
    params, batch = start()
    state = optimizer().init(params)
    for _ in range(STEPS):
        params, state = step(params, state, batch)
    assert_same_as_on_one_device(params)


@of_each_kind
def test_shard_map_with_parameters_of_each_device_beside_shared_ones():
    """As for stages of a pipeline: types say which states differ between devices."""
    mesh = jax.make_mesh((2,), ("stage",), axis_types=(AxisType.Auto,))
    specs = {"up": jax.P(), "down": jax.P("stage"), "bias": jax.P("stage")}
    of_stages = [start()[0] for _ in range(2)]
    of_stages[1] |= {name: 2 * of_stages[1][name] for name in ("down", "bias")}

    def run(params):
        state = optimizer().init(params)
        for t in range(STEPS):
            grads = jax.tree.map(lambda x, t=t: jnp.sin((t + 1) * x), params)
            params, state = apply(params, state, grads)
        return params

    params = {"up": of_stages[0]["up"]} | {
        name: jnp.concatenate([p[name] for p in of_stages]) for name in ("down", "bias")
    }
    together = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=specs))(params)
    for i, expected in enumerate(map(jax.jit(run), of_stages)):
        for name, x in expected.items():
            own = together[name] if name == "up" else jnp.split(together[name], 2)[i]
            np.testing.assert_allclose(own, x, **PARAMETERS)


@of_each_kind
def test_sharded_parameters():
    """On axes whose shardings the compiler finds; explicit ones: tests/test_sharding.py."""
    mesh = jax.make_mesh((DEVICES,), ("model",), axis_types=(AxisType.Auto,))
    spec = jax.P(None, "model")
    params, batch = start()
    shardings = {
        name: NamedSharding(mesh, spec if len(shape) == 2 else jax.P())
        for name, shape in SHAPES.items()
    }
    step = jax.jit(apply)
    # The gradients are those of one device: what is tested here is the optimizer.
    grad = jax.jit(jax.grad(loss))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, shardings)
        state = jax.jit(optimizer().init)(sharded)
    for _ in range(STEPS):
        grads = jax.tree.map(np.asarray, grad(jax.tree.map(np.asarray, sharded), batch))
        with jax.set_mesh(mesh):
            sharded, state = step(sharded, state, jax.device_put(grads, shardings))
    for name, sharding in shardings.items():
        assert sharded[name].sharding.is_equivalent_to(sharding, sharded[name].ndim)
    assert_same_as_on_one_device(sharded)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(8, 4, 32), (8, 8, 64)])
def test_codes_and_scales_of_several_axes_are_sharded_alike(dtype, shape):
    """On an explicit mesh they are multiplied; scales have fewer rows than the basis."""
    axes = ng.MatrixAxes((0, 1), 2)
    tx = ng.natural_galore_adamw(0.1, rank=2, update_interval=2, basis_dtype=dtype, axes=axes)
    params = {"w": jax.random.normal(jax.random.key(0), shape)}

    def steps(params):
        update, state = jax.jit(tx.update), tx.init(params)
        for _ in range(3):
            updates, state = update(jax.tree.map(jnp.sin, params), state, params)
        return updates["w"]

    expected = steps(params)
    with jax.set_mesh(jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])):
        found = steps(jax.device_put(params, jax.P(None, None, "x")))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
