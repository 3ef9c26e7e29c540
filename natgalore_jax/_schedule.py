"""Which matrices are refreshed at which step, from tables made before the first step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def stagger_bounds(layers: Sequence[int], interval: int) -> list[np.ndarray]:
    """Spreads the refreshes of all matrices evenly over an interval.

    The matrices of all leaves stand in one row, q = 0 … N − 1, and matrix q is due in slot
    ``⌊q T / N⌋``. The layers of one leaf that share a slot are neighbours, so that a range of
    layers per slot describes them.

    Args:
      layers: number of independent matrices in each projected leaf.
      interval: T, the number of slots.

    Returns:
      For each leaf an int32 array ``b`` of length T + 1: layers ``b[t] … b[t + 1] − 1`` are due in
      slot t.
    """
    total, offsets = sum(layers), np.cumsum([0, *layers[:-1]])
    bounds = []
    for offset, count in zip(offsets, layers, strict=True):
        slot_of_layer = (offset + np.arange(count)) * interval // total
        slots = np.arange(interval + 1)
        bounds.append(np.searchsorted(slot_of_layer, slots, side="left").astype(np.int32))
    return bounds


def due_layers(
    layers: Sequence[int], interval: int, accumulation: int, *, stagger: bool, step: jax.Array
) -> list[tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]]:
    """The range of layers of each leaf that is refreshed at this step.

    At step 0 every matrix is due, so that every matrix has a basis of its gradient from then on.

    Args:
      layers: number of independent matrices in each projected leaf.
      interval: steps between two refreshes of a matrix, a multiple of ``accumulation``.
      accumulation: refreshes happen only at multiples of it, so that the gradients that are summed
        inside the subspace share one basis.
      stagger: spread the refreshes over the interval instead of doing all in one step.
      step: scalar int32.

    Returns:
      ``(first, end)`` for each leaf; empty ranges have ``first == end``.
    """
    if interval == 1:
        return [(0, count) for count in layers]
    slots = interval // accumulation
    slot = (step // accumulation) % slots
    if not stagger:
        all_due = (step % accumulation == 0) & (slot == 0)
        return [(0, jnp.where(all_due, count, 0)) for count in layers]
    at_boundary, is_first = step % accumulation == 0, step == 0
    ranges: list[tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]] = []
    for count, bounds in zip(layers, stagger_bounds(layers, slots), strict=True):
        first, end = jax.lax.dynamic_slice(jnp.asarray(bounds), (slot,), (2,))
        first = jnp.where(is_first, 0, first)
        end = jnp.where(is_first, count, jnp.where(at_boundary, end, first))
        ranges.append((first, end))
    return ranges
