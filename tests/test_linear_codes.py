"""Numbers in eight and four bits with a scale for each block, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import linear_codes as oracle

from natgalore_jax._src.kernels.linear_codes import codes_shape, decode, encode

# Shape, batch axes, the axis and size of the blocks, the axis of the pairs.
CASES = [
    ((70, 130), 0, (0, 70), 0),  # along the shorter axis, all of it
    ((521, 600), 0, (0, 174), 0),  # no divisor: the last block is shorter; an odd number of rows
    ((3, 131, 66), 1, (2, 66), 1),  # batch, odd
    ((2, 5, 300), 1, (2, 150), 1),  # too short an axis is not divided
    ((2, 257), 1, (1, 129), 1),  # a vector for each of the batch: pairs and blocks on one axis
    ((4, 1, 1), 1, (1, 1), 1),
]
both = pytest.mark.parametrize("bits", [8, 4])
shapes = pytest.mark.parametrize("shape,batch,block,pairs", CASES)


def data(shape, seed=0):
    """Numbers of all sizes, zeros, a block of zeros, and halves between two codes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
    x[rng.random(shape) < 0.1] = 0
    x[0, ..., :1] = 0
    x[..., -1] = np.resize([127.0, 0.5, -1.5, 2.5], shape[:-1])
    return x.astype(np.float32)


@both
@shapes
def test_codes_scales_and_numbers_bit_by_bit(shape, batch, block, pairs, bits):
    x = data(shape)
    coded = encode(jnp.asarray(x), bits, batch)
    codes, scales = oracle.encode(x, bits, *block)
    assert coded.scales.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(coded.scales), scales)
    got = np.asarray(coded.codes)
    if bits == 4:
        assert got.dtype == np.uint8 and got.shape[pairs] == -(-shape[pairs] // 2)
        got = oracle.unpack(got, pairs, shape[pairs])
    np.testing.assert_array_equal(got, codes)
    assert coded.codes.shape == codes_shape(shape, bits, batch)
    numbers = decode(coded, shape, batch=batch)
    assert numbers.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(numbers), oracle.decode(codes, scales, *block))
    assert decode(coded, shape, jnp.bfloat16, batch).dtype == jnp.bfloat16


@both
@shapes
def test_half_a_scale_is_the_largest_error_and_a_second_time_nothing_changes(
    shape, batch, block, pairs, bits
):
    x = data(shape, seed=1)
    coded = encode(jnp.asarray(x), bits, batch)
    numbers = decode(coded, shape, batch=batch)
    ones = np.ones(shape, np.int8)
    s = oracle.decode(ones, np.asarray(coded.scales), *block)
    assert np.all(np.abs(np.asarray(numbers, np.float64) - x) <= s / 2 * (1 + 1e-6))
    for again, once in zip(encode(numbers, bits, batch), coded, strict=True):
        np.testing.assert_array_equal(np.asarray(again), np.asarray(once))


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_with_a_number_that_is_not_finite_is_none(bits, bad):
    x = np.ones((8, 512), np.float32)
    x[3, 300] = bad
    numbers = np.asarray(decode(encode(jnp.asarray(x), bits), x.shape))
    lost = np.isnan(numbers)
    assert lost[3, 256:].all() and lost.sum() == 256
