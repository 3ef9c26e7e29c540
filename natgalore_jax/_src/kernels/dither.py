"""Low-discrepancy dither that makes rounding unbiased over time."""

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.params.context import layer_index

# Increments of the dither per step, as fractions of 2³²: the golden ratio, whose multiples have the
# lowest discrepancy, and a second stride, out of phase with the first.
STRIDES = (np.uint32(0x9E3779B9), np.uint32(0xC13FA9A9))

_AXES = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35), np.uint32(0x27D4EB2F))
_MIX = np.uint32(0x7FEB352D)


def dither(
    shape: tuple[int, ...],
    step: jax.typing.ArrayLike,
    salt: int | jax.Array,
    stride: np.uint32,
    first: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """A low-discrepancy sequence of 32-bit thresholds over the steps for each element.

    An element starts at a hash of its indices and advances by the stride at every step. Over n
    steps it visits every part of the range nearly equally often, whereas random numbers deviate by
    √n: the rounding error of an average over time is several times smaller. A random generator
    would cost more than the optimizer; this costs a few integer operations.

    Indices are counted along each axis: nothing is flattened, and a sharded array has the same
    dithers as on one device. (In ``shard_map`` the indices are local to the shard.)

    Args:
      shape: of the array that is rounded.
      step: scalar integer.
      salt: different for each array, so that roundings are independent; an array is uint32.
      stride: one of ``STRIDES``.
      first: the index of the first entry along the first axis. None: the index of the current
        layer in a layer-by-layer update, else 0.

    Returns:
      ``shape``, uint32.
    """
    first = layer_index() if first is None else first
    if not isinstance(salt, jax.Array):
        salt = jnp.uint32(int(salt) & 0xFFFFFFFF)

    def index(shape, axis):
        found = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        return found + jnp.asarray(first).astype(jnp.uint32) if axis == 0 else found

    row = salt * np.uint32(0x632BE59B) + np.uint32(0x2545F491)
    outer = (*shape[:-1], 1)
    for axis in range(len(shape) - 1):
        row = (row ^ (index(outer, axis) * _AXES[axis % len(_AXES)])) * _MIX
        row = row ^ (row >> 15)
    hashed = row
    if shape:
        hashed = (row ^ (index(shape, len(shape) - 1) * STRIDES[0])) * _MIX
    return hashed + jnp.asarray(step).astype(jnp.uint32) * stride
