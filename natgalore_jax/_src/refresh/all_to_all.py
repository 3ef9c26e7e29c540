"""Stacks sharded along any axes, resharded by whole layers, and back.

For use within ``jax.shard_map``: arrays are the parts that one device has. ``of`` has the mesh axes
that divide each axis of the whole array, ``names`` all of them, those of the layers first. One
exchange for each other mesh axis, in the order of ``names``, gives every device whole layers.
"""

import math
from collections.abc import Sequence

import jax

from natgalore_jax._src.params.placement import Names


def to_shares(x: jax.Array, axis: int, of: Sequence[Names], names: Names) -> jax.Array:
    """This device's layers, whole.

    Args:
      x: this device's part; its layers are a multiple of the devices that they are dealt out to.
      axis: the one of the layers.
      of, names: see above; ``of[axis]`` is what ``names`` begin with.
    """
    for name in names[len(of[axis]) :]:
        at = _axis_with(of, name)
        if at is None:  # whole on all devices of this mesh axis
            size = x.shape[axis] // jax.lax.axis_size(name)
            start = jax.lax.axis_index(name) * size
            x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        else:
            x = jax.lax.all_to_all(x, name, axis, at, tiled=True)
    for at, own in enumerate(of):
        if at != axis:
            x = _reordered(x, at, _as_received(own, names), own)
    return x


def from_shares(x: jax.Array, axis: int, of: Sequence[Names], names: Names) -> jax.Array:
    """The way back from :func:`to_shares`."""
    for at, own in enumerate(of):
        if at != axis:
            x = _reordered(x, at, own, _as_received(own, names))
    for name in reversed(names[len(of[axis]) :]):
        at = _axis_with(of, name)
        if at is None:
            x = jax.lax.all_gather(x, name, axis=axis, tiled=True, to="invarying")
        else:
            x = jax.lax.all_to_all(x, name, at, axis, tiled=True)
    return x


def _axis_with(of: Sequence[Names], name: str) -> int | None:
    return next((a for a, own in enumerate(of) if name in own), None)


def _as_received(own: Names, names: Names) -> Names:
    """The order of the chunks along an axis after the exchanges: the last one is outermost."""
    return tuple(name for name in reversed(names) if name in own)


def _reordered(x: jax.Array, axis: int, order: Names, wanted: Names) -> jax.Array:
    """Chunks along an axis that are numbered by mesh axes, outermost first, in another order."""
    if order == wanted:
        return x
    sizes = [jax.lax.axis_size(name) for name in order]
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    chunks = x.reshape(*before, *sizes, x.shape[axis] // math.prod(sizes), *after)
    moved = [axis + order.index(name) for name in wanted]
    rest = range(axis + len(order), chunks.ndim)
    return chunks.transpose(*range(axis), *moved, *rest).reshape(x.shape)
