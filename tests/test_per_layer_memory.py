"""Memory that XLA reserves for a step: without gradients of the layers, everything in place."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import natgalore_jax as ng

L, D, F, ROWS = 12, 128, 384, 8
SCALE = 4  # of the matrices that are not stacked
ONE_LAYER = 2 * D * F * 4  # bytes
FLAGS = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_cpu_copy_insertion_use_region_analysis=true"
)
OPTIMIZERS = {
    "adam": lambda: optax.adam(0.1),
    "galore": lambda: ng.galore_adamw(0.1, rank=8),
    "natural galore": lambda: ng.natural_galore_adamw(0.1, rank=8),
}
CASES = [
    ("adam", "ordinary"),
    ("adam", "per layer"),
    ("adam", "unstacked"),
    ("galore", "unstacked"),
    ("natural galore", "ordinary"),
    ("natural galore", "per layer"),
    ("natural galore", "8-bit weights"),
]


def shapes(stacked):
    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    if stacked:
        layers = {"up": of(L, D, F), "down": of(L, F, D)}
        return {"embed": of(D, D), "layers": layers, "head": of(D, D)}
    # So large that each has a refresh of its own.
    d, f = SCALE * D, SCALE * F
    layers = [{"up": of(d, f), "down": of(f, d)} for _ in range(L)]
    return {"embed": of(d, d), "layers": layers, "head": of(d, d)}


def embed(params, batch):
    return batch @ params["embed"]


def layer(w, x):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def head(params, x, batch):
    return jnp.mean((x @ params["head"] - batch) ** 2)


def loss(params, batch):
    x, run = embed(params, batch), jax.checkpoint(layer)
    if isinstance(params["layers"], list):
        for w in params["layers"]:
            x = run(x=x, w=w)
    else:
        x, _ = jax.lax.scan(lambda x, w: (run(w, x), None), x, params["layers"])
    return head(params, x, batch)


def measure(name, route):
    """Bytes of temporary memory, of what is changed in place, and of parameters and state."""
    tx, params = OPTIMIZERS[name](), shapes(stacked=route != "unstacked")
    batch = jax.ShapeDtypeStruct((ROWS, SCALE * D if route == "unstacked" else D), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    if route == "8-bit weights":
        params = jax.eval_shape(ng.training.quantize_weights, params)
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))

    def ordinary(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(ordinary, donate_argnums=(0, 1))
    if route in ("per layer", "8-bit weights"):
        step = ng.training.per_layer(tx, embed, layer, head).step
        state = ng.training.PerLayerState(state, jax.ShapeDtypeStruct((), jnp.float32))
    memory = step.lower(params, state, batch).compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.alias_size_in_bytes, donated


@pytest.fixture(scope="module")
def measured():
    """All measurements, in one process with the flags that they need."""
    env = os.environ | {"XLA_FLAGS": FLAGS, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {(name, route): rest for name, route, *rest in json.loads(done.stdout)}


@pytest.mark.parametrize("name", ["adam", "natural galore"])
def test_gradients_of_one_layer_instead_of_all(measured, name):
    ordinary, _, _ = measured[name, "ordinary"]
    temp, aliased, donated = measured[name, "per layer"]
    assert ordinary > L * ONE_LAYER
    # Gradient, update and a few copies of one layer, and the inputs of all of them.
    assert temp < 5 * ONE_LAYER + 2 * L * ROWS * D * 4
    assert ordinary - temp > 0.6 * L * ONE_LAYER
    assert aliased >= donated


def test_weights_in_8_bits_are_decoded_one_layer_at_a_time(measured):
    temp, aliased, donated = measured["natural galore", "8-bit weights"]
    _, _, of_floats = measured["natural galore", "per layer"]
    assert temp < 5 * ONE_LAYER + 2 * L * ROWS * D * 4
    assert aliased >= donated
    assert of_floats - donated > 0.74 * L * ONE_LAYER


@pytest.mark.parametrize("name", ["adam", "galore"])
def test_unstacked_layers_have_that_from_xla(measured, name):
    temp, aliased, donated = measured[name, "unstacked"]
    assert temp < 0.6 * L * SCALE**2 * ONE_LAYER
    assert aliased >= donated


if __name__ == "__main__":
    json.dump([(*case, *measure(*case)) for case in CASES], sys.stdout)
