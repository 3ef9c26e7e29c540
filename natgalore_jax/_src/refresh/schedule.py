"""Schedule of refreshes, by arithmetic on the step count."""

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.kernels.kernel import kernel


@kernel("total", "interval", "accumulation", "stagger")
def due_matrices(
    total: int, interval: int, accumulation: int, *, stagger: bool, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The range of matrices that are due for a refresh at this step.

    At step 0 every matrix is due. With ``stagger`` the refreshes are spread evenly: matrix q of N
    is due in slot ``⌊q T / N⌋`` of the T slots of an interval.

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
        # Python's integers: q T may overflow int32.
        slot_of = np.array([q * slots // total for q in range(total)], np.int32)
        begin, end = (
            jnp.sum(is_past, dtype=jnp.int32) for is_past in (slot_of < slot, slot_of <= slot)
        )
        begin, end = jnp.where(step == 0, 0, begin), jnp.where(step == 0, total, end)
    else:
        begin, end = jnp.int32(0), jnp.where(slot == 0, jnp.int32(total), 0)
    return begin, jnp.where(is_boundary, end, begin)
