"""Moments in 8 bits: floats with four mantissa bits and a range that follows the block.

A block is up to ``block_size`` numbers along one axis that share a bound B on their absolute
values. With c = 2^{E-K} and 2^E the first power of two that leaves room above B, a number x ≥ 0 is
stored as the float x + c, truncated to four bits of mantissa: K octaves from c to 2^E with sixteen
steps in each. Steps are c/16 near zero, and 3 to 6 percent of x further out. Encoding takes an
addition and a shift. c is a power of two, so that the grid moves only when B crosses an octave:
decoding and encoding again is exact.

First moments have a sign and K = 8; second moments have no sign and K = 16. Rounding is dithered
(``kernels.dither``): with b2 = 0.999 a second moment changes by a thirtieth of a step, which
rounding to nearest would lose.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.params.placement import with_auto_axes

_MANTISSA = 4
_SHIFT = 23 - _MANTISSA  # truncated bits of a float32
_SIGN = 0x80
_EXPONENT_OF_C = _MANTISSA + 2  # smallest biased exponent: neither steps nor floors are subnormal
_INFINITY, _NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)

# A bound takes four bytes: a shorter axis has no blocks if another axis can have them.
_SHORTEST_AXIS = 64


class Blocks(NamedTuple):
    """Blocks of ``size`` along ``axis``; the last block may be shorter."""

    axis: int
    size: int
    count: int


def blocks_of(shape: Sequence[int], block_size: int, batch: int = 0) -> Blocks:
    """The blocks of an array, along the shorter of its last two axes.

    In gradients and their low-rank coordinates, rows or columns of the longer side differ most in
    size.

    Args:
      shape: of the array.
      block_size: the largest number of entries in a block.
      batch: the number of leading axes without blocks.
    """
    ndim = len(shape)
    last = [a for a in (ndim - 2, ndim - 1) if a >= batch and shape[a] >= _SHORTEST_AXIS]
    axis = min(last or range(batch, ndim), key=lambda a: shape[a] if last else -shape[a])
    n = shape[axis]
    even = [d for d in range(min(n, block_size), block_size // 2, -1) if n % d == 0]
    size = even[0] if even else math.ceil(n / math.ceil(n / block_size))
    return Blocks(axis, size, math.ceil(n / size))


def blocks_between(shape: Sequence[int], bounds: Sequence[int]) -> Blocks:
    """Blocks of an array, from the shapes of the array and its block scales."""
    axis = next((a for a, (n, k) in enumerate(zip(shape, bounds, strict=True)) if n != k), 0)
    return Blocks(axis, math.ceil(shape[axis] / bounds[axis]), bounds[axis])


def block_max(x: jax.Array, blocks: Blocks) -> jax.Array:
    """The largest absolute value of each block: the shape of x, but ``count`` along the axis."""
    # XLA's maximum on CPUs ignores NaN: replace it by infinity.
    return _by_block(jnp.max, jnp.where(jnp.isnan(x), jnp.inf, x), blocks)


def block_sum(x: jax.Array, blocks: Blocks) -> jax.Array:
    """The sum of the absolute values of each block, a bound for initial states.

    XLA would evaluate the maximum of a constant array at compile time, element by element.
    """
    return _by_block(jnp.sum, x, blocks)


def _by_block(reduction, x: jax.Array, blocks: Blocks) -> jax.Array:
    axis, size, count = blocks
    n = x.shape[axis]

    def reduced(x):
        x = jnp.abs(x)
        if n < size * count:
            x = jnp.pad(x, [(0, size * count - n) if a == axis else (0, 0) for a in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return reduction(x, axis + 1)

    return with_auto_axes(reduced, x, axis, (*x.shape[:axis], count, *x.shape[axis + 1 :]))


def broadcast_blocks(bounds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcast one number per block, as from :func:`block_max`, to the elements of the blocks."""
    axis, size, count = blocks_between(shape, bounds.shape)

    def repeat(x):
        if count == 1:
            return jnp.broadcast_to(x, shape)
        x = jnp.expand_dims(x, axis + 1)
        x = jnp.broadcast_to(x, (*x.shape[: axis + 1], size, *x.shape[axis + 2 :]))
        x = x.reshape(*x.shape[:axis], size * count, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, shape[axis], axis=axis)

    return with_auto_axes(repeat, bounds, axis, shape)


def encode(
    x: jax.Array, bounds: jax.Array, dither: jax.Array | None = None, *, is_second: bool
) -> jax.Array:
    """Encode numbers.

    Args:
      x: float32; not negative for second moments.
      bounds: float32, at least the absolute values in each block. Numbers above the octave of their
        bound take the largest code.
      dither: shape of x, uint32, evenly distributed, for stochastic rounding with an exact mean.
        None: round to nearest.
      is_second: whether x is a second moment.

    Returns:
      Shape of x, uint8.
    """
    c_bits = broadcast_blocks(_bits_of_c(bounds, is_second), x.shape)
    magnitude = x if is_second else jnp.abs(x)
    shifted = _bits(magnitude + _float(c_bits)) - c_bits
    shifted += jnp.uint32(1 << (_SHIFT - 1)) if dither is None else dither >> (32 - _SHIFT)
    code = jnp.minimum(shifted >> _SHIFT, jnp.uint32(0xFF if is_second else 0x7F))
    if not is_second:
        code |= (_bits(x) >> 24) & jnp.uint32(_SIGN)
    return code.astype(jnp.uint8)


def decode(codes: jax.Array, bounds: jax.Array, *, is_second: bool) -> jax.Array:
    """Decode codes to float32.

    Code 0 of a second moment is half a step instead of zero: a zero under a non-zero first moment
    would be a division by zero.
    """
    c_bits = broadcast_blocks(_bits_of_c(bounds, is_second), codes.shape)
    c, code = _float(c_bits), codes.astype(jnp.uint32)
    if is_second:
        x = _float((code << _SHIFT) + c_bits) - c
        return jnp.maximum(x, c * jnp.float32(2.0 ** -(_MANTISSA + 1)))
    x = _float(((code & jnp.uint32(_SIGN - 1)) << _SHIFT) + c_bits) - c
    return _float(_bits(x) | ((code & jnp.uint32(_SIGN)) << 24))


class MomentCodes(NamedTuple):
    """8-bit codes of one moment, and its block bounds."""

    codes: Any
    bounds: Any


def load_moment(stored: Any, *, is_second: bool) -> jax.Array:
    """Decode a moment; arrays pass through."""
    if not isinstance(stored, MomentCodes):
        return stored
    return decode(stored.codes, stored.bounds, is_second=is_second)


def store_moment(x: jax.Array, like: Any, *, is_second: bool) -> Any:
    """Store a moment in codes, rounded to nearest, or in floats, as ``like``."""
    if not isinstance(like, MomentCodes):
        return x.astype(like.dtype)
    bounds = block_max(x, blocks_between(x.shape, like.bounds.shape))
    return MomentCodes(encode(x, bounds, is_second=is_second), bounds)


def _bits_of_c(bounds: jax.Array, is_second: bool) -> jax.Array:
    """c as the bits of a float32; NaN for a non-finite bound, which makes its block NaN."""
    octaves = jnp.uint32(16 if is_second else 8)
    bits = _bits(bounds)
    # x + c plus the dither must stay below the next power of two: leave two steps of room.
    top = ((bits + jnp.uint32(2 << _SHIFT)) >> 23) + 1
    c_bits = (jnp.maximum(top, octaves + _EXPONENT_OF_C) - octaves) << 23
    return jnp.where(bits < _INFINITY, c_bits, _NAN)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
