"""All-to-all resharding of stacks, from any sharded axes to the layer axis, and back.

For use within ``jax.shard_map``: arrays are local shards. ``of`` has the mesh axes of each axis of
the global array, ``names`` all mesh axes, beginning with the layer axis's. After one all-to-all for
each other mesh axis, in the order of ``names``, every device has whole layers.
"""

import math
from collections.abc import Sequence

import jax

from natgalore_jax._src.params.placement import Names


def shard_by_layer(x: jax.Array, axis: int, of: Sequence[Names], names: Names) -> jax.Array:
    """Reshard so that the layer axis is sharded over all mesh axes, and no other axis is.

    Args:
      x: local shard; the sizes of the mesh axes that are added divide its number of layers.
      axis: the layer axis.
      of, names: see above; ``names`` begins with ``of[axis]``.
    """
    for name in names[len(of[axis]) :]:
        at = _axis_with(of, name)
        if at is None:  # replicated over this mesh axis
            size = x.shape[axis] // jax.lax.axis_size(name)
            start = jax.lax.axis_index(name) * size
            x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        else:
            x = jax.lax.all_to_all(x, name, axis, at, tiled=True)
    for at, own in enumerate(of):
        if at != axis:
            x = _reordered(x, at, _as_received(own, names), own)
    return x


def unshard_by_layer(x: jax.Array, axis: int, of: Sequence[Names], names: Names) -> jax.Array:
    """Inverse of :func:`shard_by_layer`."""
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
    """Order of the chunks along an axis after the all-to-alls: the last mesh axis is outermost."""
    return tuple(name for name in reversed(names) if name in own)


def _reordered(x: jax.Array, axis: int, order: Names, wanted: Names) -> jax.Array:
    """Reorder chunks along an axis from one order of mesh axes, outermost first, to another."""
    if order == wanted:
        return x
    sizes = [jax.lax.axis_size(name) for name in order]
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    chunks = x.reshape(*before, *sizes, x.shape[axis] // math.prod(sizes), *after)
    moved = [axis + order.index(name) for name in wanted]
    rest = range(axis + len(order), chunks.ndim)
    return chunks.transpose(*range(axis), *moved, *rest).reshape(x.shape)
