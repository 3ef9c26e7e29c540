"""Schedule of refreshes, by arithmetic on the step count."""

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.kernel import kernel


@kernel("total", "interval", "accumulation", "stagger")
def due_matrices(
    total: int, interval: int, accumulation: int, *, stagger: bool, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The range of matrices that are due for a refresh at this step.

    At step 0 every matrix is due. With ``stagger`` the refreshes are spread evenly: matrix q of N
    is due in slot ``⌊q T / N⌋`` of the T slots of an interval. Slot t therefore has the matrices
    from ``⌈t N / T⌉`` to ``⌈(t + 1) N / T⌉ − 1``.

    Args:
      total: N, the number of matrices of all projected leaves.
      interval: steps between two refreshes of a matrix, a multiple of ``accumulation``.
      accumulation: refreshes fall on its multiples, so that the gradients that are summed inside
        the subspace share one basis.
      stagger: spread the refreshes over the interval instead of doing all in one step.
      step: scalar int32.

    Returns:
      ``(begin, end)``, int32; equal if none is due.
    """
    slots = interval // accumulation
    slot, is_boundary = (step // accumulation) % slots, step % accumulation == 0
    if stagger:
        begin, end = (_ceil_of_quotient(slot + k, total, slots) for k in (0, 1))
        begin, end = jnp.where(step == 0, 0, begin), jnp.where(step == 0, total, end)
    else:
        begin, end = jnp.int32(0), jnp.where(slot == 0, jnp.int32(total), 0)
    return begin, jnp.where(is_boundary, end, begin)


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
