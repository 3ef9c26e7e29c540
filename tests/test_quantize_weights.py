"""Weights in 8 bits: how they are stored, and that no update is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import weight_codes as oracle

import natgalore_jax as ng
from natgalore_jax._src.kernels.linear_codes import LinearCodes
from natgalore_jax._src.low_bits.weights import read_weight, write_weight

write = jax.jit(write_weight, static_argnums=3)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def leaf(weights, name):
    return LinearCodes(weights.codes[name], weights.scales[name])


@pytest.mark.parametrize(
    "shape,axis,size",
    [((3, 96, 300), 1, 96), ((300, 600), 0, 150), ((40, 12, 20), 2, 20), ((521,), 0, 174)],
)
def test_codes_and_scales_bit_by_bit_and_half_a_scale_of_error(shape, axis, size):
    params = {"w": normal(*shape), "norm": normal(8)}
    where = {"w": True, "norm": False}
    weights = ng.training.quantize_weights(params, where)
    scales = oracle.new_scales(np.asarray(params["w"]), axis, size)
    np.testing.assert_array_equal(np.asarray(weights.scales["w"]), scales)
    s = oracle.spread(scales, shape[axis], axis, size)
    codes = np.rint(np.asarray(params["w"]) / s)
    np.testing.assert_array_equal(weights.codes["w"], codes)
    assert np.abs(codes).max() == 120  # a sixteenth of 127 is left
    decoded = ng.training.dequantize_weights(weights)
    np.testing.assert_array_equal(decoded["w"], codes * s)
    assert np.all(np.abs(decoded["w"] - params["w"]) <= s / 2 * (1 + 1e-6))
    np.testing.assert_array_equal(decoded["norm"], params["norm"])


def test_the_mean_of_rounded_weights_is_exact():
    """Updates from a thousandth of a step to several, of both signs."""
    weights = leaf(ng.training.quantize_weights({"w": normal(64, 96)}), "w")
    s = np.asarray(read_weight(weights._replace(codes=jnp.ones((64, 96), jnp.int8)), jnp.float32))
    update = np.geomspace(1e-3, 3, 64 * 96).reshape(64, 96) * s
    x = read_weight(weights, jnp.float32) + jnp.asarray(update * (-1) ** np.arange(96), jnp.float32)
    steps = 1024
    seen = jax.lax.map(
        lambda t: read_weight(write(x, weights, t, 0), jnp.float32), jnp.arange(steps)
    )
    scales = write(x, weights, 0, 0).scales
    s = oracle.spread(np.asarray(scales), 64, 0, 64)
    # Thresholds that are golden ratio steps apart: an error of log(n) / n; random ones 0.5 / √n.
    assert np.all(np.abs(np.asarray(seen, np.float64).mean(0) - x) <= 0.01 * s)
    assert np.all(np.abs(seen - x) < s * (1 + 1e-5))


def test_nothing_moves_without_an_update():
    weights = leaf(ng.training.quantize_weights({"w": normal(2, 70, 300)}), "w")
    for count in range(5):
        again = write(read_weight(weights, jnp.float32), weights, count, 7)
        jax.tree.map(np.testing.assert_array_equal, again, weights)


def test_a_block_that_grows_shrinks_or_breaks_has_a_new_scale():
    x = normal(64, 4)
    old = leaf(ng.training.quantize_weights({"w": x}), "w")
    factors = jnp.array([1.03, 1.2, 0.4, jnp.nan])
    new = write(factors * x, old, 0, 0)
    kept = np.asarray(new.scales == old.scales)[0]
    np.testing.assert_array_equal(kept, [True, False, False, False])
    assert np.all(np.abs(new.codes[:, :3]).max(0) > 100)
    decoded = np.asarray(read_weight(new, jnp.float32))
    assert np.all(np.abs(decoded - factors * x)[:, :3] < np.asarray(new.scales[:, :3], np.float32))
    assert np.isnan(decoded[:, 3]).all() and np.isfinite(decoded[:, :3]).all()


def test_a_block_of_zeros_comes_to_life():
    old = leaf(ng.training.quantize_weights({"w": jnp.zeros((64, 64))}), "w")
    x = normal(64, 64)
    assert np.all(read_weight(old, jnp.float32) == 0)
    np.testing.assert_allclose(read_weight(write(x, old, 3, 0), jnp.float32), x, atol=0.03)


def test_empty_arrays_are_left_alone():
    params = {"a": jnp.zeros(0), "b": jnp.zeros((2, 0, 8)), "w": normal(4, 4)}
    weights = ng.training.quantize_weights(params, where=True)
    assert {name: x.dtype for name, x in weights.codes.items()} == {
        "a": jnp.float32,
        "b": jnp.float32,
        "w": jnp.int8,
    }


def test_from_shapes_alone_and_in_its_bytes():
    params = {"layers": {"w": jax.ShapeDtypeStruct((2, 512, 1376), jnp.bfloat16)}}
    weights = jax.eval_shape(ng.training.quantize_weights, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    assert size == 2 * 512 * 1376 + 2 * (2 * 2 * 1376) + 4


def test_errors():
    with pytest.raises(
        TypeError, match=r"tokens: only floating-point .* got int32 of shape \(3,\)"
    ):
        ng.training.quantize_weights({"tokens": jnp.zeros(3, jnp.int32)}, where=True)
    with pytest.raises(TypeError, match=r"gain: only floating-point .* got float32 of shape \(\)"):
        ng.training.quantize_weights({"gain": 0.5}, where=True)
    with pytest.raises(ValueError, match="block_size must be at least 16, got 8"):
        ng.training.quantize_weights({"w": normal(64, 64)}, block_size=8)
    with pytest.raises(TypeError, match="takes QuantizedWeights, got dict"):
        ng.training.dequantize_weights({"w": normal(64, 64)})
