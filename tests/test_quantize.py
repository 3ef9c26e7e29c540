"""The 8-bit format of moments, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import eight_bits as oracle

from natgalore_jax._src.kernels.dither import STRIDES, dither
from natgalore_jax._src.kernels.float8_blocks import (
    block_max,
    block_sum,
    blocks_between,
    blocks_of,
    broadcast_blocks,
    decode,
    encode,
)

encode = jax.jit(encode, static_argnames="is_second")
decode = jax.jit(decode, static_argnames="is_second")

both_formats = pytest.mark.parametrize("is_second", [False, True])


def data(shape, is_second, seed=0):
    """Numbers of all sizes, with zeros, a block of zeros, and ends of octaves."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
    x[rng.random(shape) < 0.1] = 0
    x[..., 0] = 0
    x[..., 1] = np.resize([1.0, 0.5, 31 / 32, 30 / 32, 2.0**-20, 1 - 2.0**-24], shape[:-1])
    return (x * x if is_second else x).astype(np.float32)


@both_formats
@pytest.mark.parametrize("is_dithered", [False, True])
def test_codes_and_numbers_are_those_of_the_definition_bit_by_bit(is_second, is_dithered):
    x = data((70, 12), is_second)
    bounds = np.abs(x).max(0, keepdims=True)
    noise = oracle.dithers(x.shape, 5, 3, int(STRIDES[0])) if is_dithered else None
    codes = encode(
        jnp.asarray(x),
        jnp.asarray(bounds),
        None if noise is None else jnp.asarray(noise),
        is_second=is_second,
    )
    numbers = decode(codes, jnp.asarray(bounds), is_second=is_second)
    assert codes.dtype == jnp.uint8 and numbers.dtype == jnp.float32
    for i, j in np.ndindex(*x.shape):
        c = oracle.c_of(bounds[0, j], is_second)
        u = None if noise is None else int(noise[i, j])
        assert codes[i, j] == oracle.nearest_or_dithered(x[i, j], c, is_second, u), (i, j)
        assert float(numbers[i, j]) == oracle.number(int(codes[i, j]), c, is_second), (i, j)


@both_formats
def test_every_code_stands_for_a_number_that_it_is_the_code_of(is_second):
    codes = jnp.arange(256, dtype=jnp.uint8)
    for bound in (1.0, 3e-5, 7.7):
        bounds = jnp.full((1,), bound, jnp.float32)
        again = encode(
            decode(codes, bounds, is_second=is_second),
            bounds,
            jnp.full(256, 12345 << 13, jnp.uint32),  # any dither: there is nothing to round
            is_second=is_second,
        )
        # The floor of a second moment of code 0 lies between two codes.
        known = np.arange(256) >= is_second
        np.testing.assert_array_equal(np.asarray(again)[known], np.asarray(codes)[known])


@both_formats
def test_error_bounds_of_each_block(is_second):
    x = data((512, 40), is_second, seed=1)
    bounds = block_max(jnp.asarray(x), blocks_of(x.shape, 128))
    codes = encode(jnp.asarray(x), bounds, is_second=is_second)
    error = np.abs(np.asarray(decode(codes, bounds, is_second=is_second), np.float64) - x)
    c = np.vectorize(oracle.c_of)(np.asarray(bounds, np.float64), is_second)
    c = np.asarray(broadcast_blocks(jnp.asarray(c, jnp.float32), x.shape), np.float64)
    # Half a step of the octave that |x| + c is in; a step is at most 1/16 of the octave's start.
    assert np.all(error <= (np.abs(x) + c) / 32 * (1 + 1e-6))
    # c itself is small beside the largest of the block.
    largest = np.asarray(broadcast_blocks(bounds, x.shape), np.float64)
    at_most = 2.0 ** (-16 if is_second else -8) * largest * 32 / 15
    assert np.all(c[largest > 0] <= at_most[largest > 0])


@both_formats
def test_dithered_codes_are_right_on_average(is_second):
    x = jnp.asarray(data((64, 8), is_second, seed=2))
    bounds = jnp.max(jnp.abs(x), 0, keepdims=True)
    steps = 512

    def at(step):
        codes = encode(x, bounds, dither(x.shape, step, 0, STRIDES[0]), is_second=is_second)
        return decode(codes, bounds, is_second=is_second)

    mean = np.asarray(jnp.mean(jax.lax.map(at, jnp.arange(steps)), 0), np.float64)
    c = np.vectorize(oracle.c_of)(np.asarray(bounds, np.float64), is_second)
    step_size = (np.abs(np.asarray(x)) + c) / 16
    # The floor of a second moment is half a step where the code is zero.
    expected = np.maximum(np.asarray(x), c / 32) if is_second else np.asarray(x)
    known = np.asarray(x) >= c / 16 if is_second else np.ones(x.shape, bool)
    # Golden ratio steps visit an interval with an error of about log(n)/n; random ones 0.5/√n.
    assert np.all(np.abs(mean - expected)[known] <= (0.01 * step_size)[known] + 1e-7 * mean[known])


def test_a_second_moment_is_never_zero_where_its_block_is_not():
    v = jnp.zeros((64, 3), jnp.float32).at[0].set(jnp.array([1.0, 1e-12, 1e-30]))
    bounds = jnp.max(v, 0, keepdims=True)
    numbers = decode(encode(v, bounds, is_second=True), bounds, is_second=True)
    assert np.all(np.asarray(numbers) > 0)


@both_formats
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_with_a_number_that_is_not_finite_is_none(is_second, bad):
    x = jnp.ones((128, 70), jnp.float32).at[3, 5].set(bad)
    blocks = blocks_of(x.shape, 64)
    bounds = block_max(x, blocks)
    numbers = np.asarray(
        decode(encode(x, bounds, is_second=is_second), bounds, is_second=is_second)
    )
    lost = np.isnan(numbers)
    assert lost.sum() == blocks.size and lost[3, 5] and not lost[3, 40]


@pytest.mark.parametrize(
    "shape,block_size,batch,expected",
    [
        ((512, 512), 256, 0, (0, 256, 2)),  # a tie: the last axis but one
        ((512, 1376), 256, 0, (0, 256, 2)),
        ((1376, 512), 256, 0, (1, 256, 2)),
        ((1376, 2000), 256, 0, (0, 172, 8)),  # the largest divisor
        ((128, 1376), 128, 0, (0, 128, 1)),
        ((509, 600), 128, 0, (0, 128, 4)),  # no divisor: the last block is shorter
        ((514, 600), 256, 0, (0, 172, 3)),
        ((32, 1000), 256, 0, (1, 250, 4)),  # too short to be divided
        ((100, 8, 32), 256, 1, (2, 32, 1)),  # never across the batch
        ((100, 8, 32), 256, 0, (0, 100, 1)),
        ((5000,), 256, 0, (0, 250, 20)),
    ],
)
def test_blocks(shape, block_size, batch, expected):
    blocks = blocks_of(shape, block_size, batch)
    assert blocks == expected
    bounds = [blocks.count if a == blocks.axis else n for a, n in enumerate(shape)]
    assert blocks_between(shape, bounds) == blocks


@pytest.mark.parametrize("shape", [(509, 70), (3, 70, 130), (1000,)])
def test_bounds_of_blocks_and_back(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    blocks = blocks_of(shape, 64)
    largest, total = (np.asarray(f(jnp.asarray(x), blocks)) for f in (block_max, block_sum))
    parts = np.split(np.abs(x), range(blocks.size, shape[blocks.axis], blocks.size), blocks.axis)
    np.testing.assert_array_equal(
        largest, np.stack([p.max(blocks.axis) for p in parts], blocks.axis)
    )
    np.testing.assert_allclose(
        total, np.stack([p.sum(blocks.axis) for p in parts], blocks.axis), 1e-5
    )
    back = np.asarray(broadcast_blocks(jnp.asarray(largest), shape))
    expected = [np.broadcast_to(p.max(blocks.axis, keepdims=True), p.shape) for p in parts]
    np.testing.assert_array_equal(back, np.concatenate(expected, blocks.axis))


def test_dithers_are_the_hash_and_spread_evenly():
    shape = (3, 5, 7)
    got = np.asarray(dither(shape, 11, 4, STRIDES[1]))
    np.testing.assert_array_equal(got, oracle.dithers(shape, 11, 4, int(STRIDES[1])))
    for salt in range(3):
        u = np.asarray(dither((64, 256), 0, salt, STRIDES[0])) / 2**32
        assert len(np.unique(u)) > 0.99 * u.size
        # Standard deviations of means and correlations of independent uniform numbers, four times.
        assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / u.size)
        for other in (u[1:, :] * u[:-1, :], u[:, 1:] * u[:, :-1]):
            assert abs(other.mean() - 0.25) < 4 * np.sqrt(7 / 144 / other.size)
