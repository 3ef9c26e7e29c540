"""Which matrices are due for a refresh at which step: arithmetic on the step count, no tables."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from natgalore_jax._kernel import kernel

# The layers of one leaf that are due: first and end.
Range = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]


def due_layers(
    layers: Sequence[int], interval: int, accumulation: int, *, stagger: bool, step: jax.Array
) -> list[Range]:
    """The range of layers of each leaf that is refreshed at this step.

    At step 0 every matrix is due, so that every matrix has a basis of its gradient from then on.

    With ``stagger`` the refreshes are spread evenly: the N matrices of all leaves stand in one row,
    and matrix q is due in slot ``⌊q T / N⌋`` of the T slots of an interval. So the matrices from
    ``⌈t N / T⌉`` to ``⌈(t + 1) N / T⌉ − 1`` are due in slot t, and those of one leaf are a range.

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
    return _due_layers(tuple(layers), interval, accumulation, stagger, step)


@kernel("layers", "interval", "accumulation", "stagger")
def _due_layers(
    layers: tuple[int, ...], interval: int, accumulation: int, stagger: bool, step: jax.Array
) -> list[Range]:
    slots, total = interval // accumulation, sum(layers)
    slot, is_boundary = (step // accumulation) % slots, step % accumulation == 0
    if stagger:
        begin, end = (_ceil_of_quotient(slot + k, total, slots) for k in (0, 1))
        begin, end = jnp.where(step == 0, 0, begin), jnp.where(step == 0, total, end)
    else:
        begin, end = jnp.int32(0), jnp.where(slot == 0, jnp.int32(total), 0)
    end = jnp.where(is_boundary, end, begin)
    ranges, offset = [], 0
    for count in layers:
        ranges.append(tuple(jnp.clip(x - offset, 0, count) for x in (begin, end)))
        offset += count
    return ranges


def _ceil_of_quotient(a: jax.Array, n: int, d: int) -> jax.Array:
    """``⌈a n / d⌉`` for int32 ``0 ≤ a ≤ d``, although ``a n`` may overflow.

    Long multiplication by n, one binary digit at a time: ``a n = q d + r`` with ``r < d < 2³¹``.
    """
    a, q, r = (jnp.asarray(x).astype(jnp.uint32) for x in (a, 0, 0))
    for digit in f"{n:b}":
        q, r = _carried(2 * q, 2 * r, d)
        if digit == "1":
            q, r = _carried(q, r + a, d)
    return (q + (r > 0).astype(jnp.uint32)).astype(jnp.int32)


def _carried(q: jax.Array, r: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """``q d + r`` with a remainder below d, for ``r < 2 d``."""
    exceeds = r >= d
    return jnp.where(exceeds, q + 1, q), jnp.where(exceeds, r - d, r)
