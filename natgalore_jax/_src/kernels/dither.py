"""Low-discrepancy dither that makes rounding unbiased over time."""

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.params.context import layer_index

# Steps from one dither to the next, as fractions of 2³²: the golden ratio, which spreads the
# dithers of one element over time as evenly as can be, and one that runs out of step with it.
STRIDES = (np.uint32(0x9E3779B9), np.uint32(0xC13FA9A9))

_AXES = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35), np.uint32(0x27D4EB2F))
_MIX = np.uint32(0x7FEB352D)


def dither(
    shape: tuple[int, ...],
    step: jax.typing.ArrayLike,
    salt: int,
    stride: np.uint32,
    first: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Numbers that each element takes from all over the range of 32 bits as the steps go by.

    Every element starts at its own place, a hash of its indices, and moves on by the stride at each
    step. Over n steps it visits every part of the range nearly equally often, which random numbers
    do with an error of √n: what rounding adds to an average over time is several times less. And it
    costs a few integer operations, where a random generator would cost more than the optimizer.

    Indices are counted along each axis, so that nothing is flattened and a sharded array has the
    dithers that it has on one device. (In ``shard_map`` indices are those of the shard.)

    Args:
      shape: of the array that is rounded.
      step: scalar integer.
      salt: another one for every array, so that no two are rounded alike.
      stride: one of ``STRIDES``.
      first: the index of the first entry along the first axis. None: that of the layer that an
        optimizer works on, or 0.

    Returns:
      ``shape``, uint32.
    """
    first = layer_index() if first is None else first
    row = jnp.uint32((salt * 0x632BE59B + 0x2545F491) & 0xFFFFFFFF)
    outer = (*shape[:-1], 1)
    for axis in range(len(shape) - 1):
        index = jax.lax.broadcasted_iota(jnp.uint32, outer, axis)
        if axis == 0:
            index = index + jnp.asarray(first).astype(jnp.uint32)
        row = (row ^ (index * _AXES[axis % len(_AXES)])) * _MIX
        row = row ^ (row >> 15)
    hashed = row
    if shape:
        column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
        hashed = (row ^ (column * STRIDES[0])) * _MIX
    return hashed + jnp.asarray(step).astype(jnp.uint32) * stride
