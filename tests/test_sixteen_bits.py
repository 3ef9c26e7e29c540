"""Second moments of 16-bit parameters and gradients decay as in float32, and nothing underflows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

OPTIMIZERS = {
    "galore": lambda: ng.galore_adamw(1.0, rank=4, weight_decay=0.0),
    "natural": lambda: ng.natural_galore_adamw(1.0, rank=4, weight_decay=0.0),
    # Matrices of this size are too small for 8 bits.
    "8 bits": lambda: ng.natural_galore_adamw(1.0, rank=4, weight_decay=0.0, moment_bits=8),
    "apollo": lambda: ng.contrib.apollo_adamw(1.0, rank=4, weight_decay=0.0),
    "ldadam": lambda: ng.contrib.ldadamw(1.0, rank=4, weight_decay=0.0),
    "racs": lambda: ng.contrib.racs_adamw(1.0, weight_decay=0.0),
    "scale": lambda: ng.contrib.scale_sgd(1.0, weight_decay=0.0),
    "alice": lambda: ng.contrib.alice_adamw(1.0, rank=4, weight_decay=0.0),
}
DTYPES = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
DTYPES += [("float16", "float16")]


def sizes(tx, param_dtype, grad_dtype, large):
    """Root mean square of the last updates, after gradients that shrink a hundredfold."""
    params = {"w": jnp.zeros((16, 24), param_dtype), "b": jnp.zeros(24, param_dtype)}

    def step(state, count):
        size = jnp.where(count < 300, large, large / 100)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count))
        grads = {
            name: (size * jax.random.normal(key, x.shape)).astype(grad_dtype)
            for key, (name, x) in zip(keys, params.items(), strict=True)
        }
        updates, state = tx.update(grads, state, params)
        dtype = jnp.result_type(grad_dtype, param_dtype)
        assert {u.dtype for u in jax.tree.leaves(updates)} <= {dtype, jnp.dtype(param_dtype)}
        return state, jax.tree.map(lambda u: jnp.mean(jnp.square(u.astype(jnp.float32))), updates)

    _, found = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(2500)))(tx.init(params))
    return {name: float(jnp.sqrt(jnp.mean(x[-200:]))) for name, x in found.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), DTYPES)
def test_updates_of_shrinking_gradients_are_those_in_float32(name, param_dtype, grad_dtype):
    large = 1e-2 if grad_dtype == "float16" else 1.0  # Then squares are below 6e-8 in the end.
    expected = sizes(OPTIMIZERS[name](), "float32", "float32", large)
    found = sizes(OPTIMIZERS[name](), param_dtype, grad_dtype, large)
    # Optax's Adam is a factor of 0.06 off in bfloat16 and of 1e4 in float16. LDAdam is chaotic: its
    # feedback of errors has a scale of its own.
    rel = 0.25 if name == "ldadam" else 0.02
    assert found == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("nesterov", [False, True])
def test_float32_is_adam_of_optax(nesterov):
    inner = optax.scale_by_adam(0.9, 0.999, 1e-8, nesterov=nesterov)
    make = ng.natural_galore_adamw if nesterov else ng.galore_adamw
    tx, expected = make(1.0, rank=4, weight_decay=0.0), inner
    params = {"b": jnp.zeros(24)}  # Not projected.
    with pytest.raises(ValueError, match="where selects no"):
        tx.init(params)
    params = {"w": jnp.zeros((16, 24))} | params
    state, other = tx.init(params), expected.init({"b": params["b"]})
    for count in range(5):
        g = jax.random.normal(jax.random.key(count), (24,))
        updates, state = tx.update({"w": jnp.ones((16, 24)), "b": g}, state, params)
        wanted, other = expected.update({"b": g}, other)
        if not nesterov:  # The default's steps are cautious too.
            np.testing.assert_allclose(updates["b"], -wanted["b"], rtol=3e-7)  # a rounding
        (adam,) = [s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]
        np.testing.assert_allclose(adam.nu["b"], other.nu["b"], rtol=3e-7)


def _is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


def test_layers_and_meshes_do_not_change_the_moments():
    """On explicit axes, of a stack as of one device."""
    tx = ng.galore_adamw(1.0, rank=4, weight_decay=0.0, where=lambda path, _: "w" in str(path))
    params = {"w": jnp.ones((3, 16, 24), jnp.bfloat16), "b": jnp.ones((8, 32), jnp.bfloat16)}
    grads = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype), params
    )

    def two(params, grads):
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(grads, state, params)
        (adam,) = [s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]
        return adam.nu["b"]

    expected = jax.jit(two)(params, grads)
    with jax.set_mesh(jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])):
        specs = {"w": jax.P(None, "x"), "b": jax.P("x")}
        sharded = [jax.tree.map(jax.device_put, tree, specs) for tree in (params, grads)]
        np.testing.assert_array_equal(jax.jit(two)(*sharded), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_may_be_a_python_number(name):
    tx, found = OPTIMIZERS[name](), []
    for number in (2.0, jnp.float32(2.0)):
        params = {"w": jnp.ones((16, 24)), "temperature": number}
        updates, _ = tx.update(params, tx.init(params), params)
        found.append(updates["temperature"])
    np.testing.assert_allclose(*found, rtol=1e-6)
    assert found[0] < -0.5
