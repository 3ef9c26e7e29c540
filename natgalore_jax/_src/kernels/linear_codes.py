"""Linear codes: integers of 8 or 4 bits, times a scale for each block.

A block is up to 256 numbers along one axis. With s its scale, ``x ≈ s c`` for integers c up to
c_max = 127 or 7 in absolute value, rounded to nearest: the error of a number is at most s / 2, and
s is the largest absolute value of the block over c_max.

Scales are bfloat16, and codes are computed from the rounded scale. Its rounding error of at most
1/256 moves the largest number of a block by less than half a step, so that its code is still c_max.
s c_max is exact in float32: decoding and encoding again gives the same codes and scales.

4-bit codes are packed in pairs: neighbours along the second to last axis, so that sharding is
unchanged and the last, contiguous axis is not interleaved.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgalore_jax._src.kernels.float8_blocks import (
    Blocks,
    block_max,
    block_sum,
    blocks_of,
    broadcast_blocks,
)
from natgalore_jax._src.params.placement import with_auto_axes

BLOCK_SIZE = 256

_TINY = np.float32(jnp.finfo(jnp.bfloat16).tiny)


class LinearCodes(NamedTuple):
    """Numbers in 8 or 4 bits: scale · code, with a scale for each block of up to 256.

    In the state of a transformation each field is a tree of parameters, or for bases a tuple of
    such trees.
    """

    #: int8 in the shape of the numbers; or uint8 with two 4-bit codes plus 8 in a byte, number 2k
    #: in the lower half: the second to last axis is half as long, rounded up.
    codes: Any
    #: bfloat16 in the shape of the numbers, except that one axis has an entry for each block.
    #: MaskedNode for arrays without an axis, whose codes are the numbers themselves.
    scales: Any


def coded_bits(dtype: Any) -> int | None:
    """Bits of a code for int8 and int4, None for floats."""
    if dtype is None:
        return None
    return {jnp.dtype("int8"): 8, jnp.dtype("int4"): 4}.get(jnp.dtype(dtype))


def codes_shape(shape: Sequence[int], bits: int, batch: int = 0) -> tuple[int, ...]:
    """The shape of the codes of an array."""
    out = list(shape)
    if bits == 4:
        axis = _packed_axis(len(shape), batch)
        out[axis] = math.ceil(out[axis] / 2)
    return tuple(out)


def relative_error(bits: int) -> float:
    """Relative mean square of the rounding error of normal numbers in blocks of 256.

    s² / 12 with s = 3 / c_max: the largest of 256 is at about three standard deviations.
    """
    return (3 / _largest_code(bits)) ** 2 / 12


def encode(x: jax.Array, bits: int, batch: int = 0) -> LinearCodes:
    """Encode numbers, rounded to nearest.

    Args:
      x: floating-point, at least one axis that is not a batch axis. A block below bfloat16's normal
        numbers becomes zero.
      bits: 8 or 4.
      batch: the number of leading axes without blocks.
    """
    return _encode(block_max, x, bits, batch)


def encode_zeros(x: jax.Array, bits: int, batch: int = 0) -> LinearCodes:
    """Encode an array of zeros cheaply for the compiler, see :func:`.block_sum`."""
    return _encode(block_sum, x, bits, batch)


def decode(
    coded: LinearCodes, shape: Sequence[int], dtype: Any = jnp.float32, batch: int = 0
) -> jax.Array:
    """Decode codes.

    Args:
      coded: arrays, not trees.
      shape: of the numbers.
      dtype: of the result; products are float32.
      batch: as for :func:`encode`.
    """
    shape, codes = tuple(shape), coded.codes
    if codes.dtype == jnp.uint8:
        codes = _unpacked(codes, shape, _packed_axis(len(shape), batch))
    scales = broadcast_blocks(coded.scales.astype(jnp.float32), shape)
    return (codes.astype(jnp.float32) * scales).astype(dtype)


Stored = jax.Array | LinearCodes


def bits_of(coded: LinearCodes) -> int:
    """Bits of a code; the fields may be trees."""
    return 4 if any(x.dtype == jnp.uint8 for x in jax.tree.leaves(coded.codes)) else 8


def load(stored: Stored, shape: Sequence[int], dtype: Any, batch: int = 0) -> jax.Array:
    """Decode codes in this dtype; arrays pass through."""
    return decode(stored, shape, dtype, batch) if isinstance(stored, LinearCodes) else stored


def store(x: jax.Array, like: Stored, batch: int = 0) -> Stored:
    """Store x in codes or floats, as ``like``."""
    if isinstance(like, LinearCodes):
        return encode(x, bits_of(like), batch)
    return x.astype(like.dtype)


def _encode(
    bound_of: Callable[[jax.Array, Blocks], jax.Array], x: jax.Array, bits: int, batch: int
) -> LinearCodes:
    x, largest = x.astype(jnp.float32), _largest_code(bits)
    scales = bound_of(x, blocks_of(x.shape, BLOCK_SIZE, batch)) / largest
    scales = normal_scales(scales.astype(jnp.bfloat16))
    s = broadcast_blocks(scales.astype(jnp.float32), x.shape)
    codes = jnp.clip(jnp.round(x / jnp.where(s > 0, s, 1.0)), -largest, largest)
    codes = jnp.where(s > 0, codes, 0.0).astype(jnp.int8)
    if bits == 4:
        codes = _packed(codes, batch)
    return LinearCodes(codes, scales)


def normal_scales(scales: jax.Array) -> jax.Array:
    """Subnormal scales become 0, non-finite scales NaN, which makes the whole block NaN."""
    return jnp.where(jnp.isfinite(scales), jnp.where(scales < _TINY, 0, scales), jnp.nan)


def _largest_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def _packed_axis(ndim: int, batch: int) -> int:
    return max(ndim - 2, batch)


def _packed(codes: jax.Array, batch: int) -> jax.Array:
    """Pack neighbours into one byte, the first in the lower half."""
    axis = _packed_axis(codes.ndim, batch)

    def pack(codes):
        nibbles = (codes + 8).astype(jnp.uint8)
        if codes.shape[axis] % 2:
            nibbles = jnp.pad(nibbles, [(0, int(a == axis)) for a in range(codes.ndim)])
        lower, upper = (jax.lax.slice_in_dim(nibbles, k, None, 2, axis) for k in range(2))
        return lower | (upper << 4)

    return with_auto_axes(pack, codes, axis, codes_shape(codes.shape, 4, batch))


def _unpacked(codes: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    def unpack(codes):
        nibbles = jnp.stack([codes & 15, codes >> 4], axis + 1)
        nibbles = nibbles.reshape(*codes.shape[:axis], -1, *codes.shape[axis + 1 :])
        return jax.lax.slice_in_dim(nibbles, 0, shape[axis], axis=axis).astype(jnp.int8) - 8

    return with_auto_axes(unpack, codes, axis, shape)


def leaves_of(flatten: Callable[[Any], list[Any]], tree: Any) -> list[Any]:
    """The entries of each leaf: arrays, :class:`LinearCodes` of arrays, or MaskedNode.

    Args:
      flatten: flattens a tree of parameters.
      tree: a tree of parameters, or LinearCodes of two trees.
    """
    if not isinstance(tree, LinearCodes):
        return flatten(tree)
    return [
        codes if isinstance(scales, optax.MaskedNode) else LinearCodes(codes, scales)
        for codes, scales in zip(*map(flatten, tree), strict=True)
    ]


def tree_of(treedef: Any, leaves: Sequence[Any], is_coded: bool) -> Any:
    """Inverse of :func:`leaves_of`."""
    if not is_coded:
        return treedef.unflatten(leaves)
    pairs = [
        x if isinstance(x, LinearCodes) else LinearCodes(x, optax.MaskedNode()) for x in leaves
    ]
    fields = zip(*pairs, strict=True) if pairs else ((), ())
    return LinearCodes(*map(treedef.unflatten, fields))
