"""What was stored in the coordinates of an old basis, in those of a new one.

``C = P'ᵀ P`` (r, r) takes coordinates in P to coordinates in P'. The arrays here are one matrix's:
low-rank coordinates without batch axes.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

TRANSITIONS = ("rotate", "reset", "keep")


def rotate_linear(M: jax.Array, C_of_axis: Mapping[int, jax.Array]) -> jax.Array:
    """``M ×_a C`` for every projected axis a: exact for first moments and for past gradients.

    Args:
      M: low-rank coordinates, any dtype.
      C_of_axis: for each projected axis of M its (r', r) change of coordinates.

    Returns:
      Shape and dtype of M.
    """
    out = M.astype(jnp.float32)
    for axis, C in C_of_axis.items():
        out = jnp.moveaxis(jnp.tensordot(C, out, axes=(1, axis)), 0, axis)
    return out.astype(M.dtype)


def rotate_second_moment(V: jax.Array, C_of_axis: Mapping[int, jax.Array]) -> jax.Array:
    """``v'_i = Σ_j C_ij² v_j + (1 − Σ_j C_ij²) v̄`` along every projected axis.

    The variance of a sum of uncorrelated terms with weights C_ij is the sum with weights C_ij².
    What a new direction has outside the old basis was never observed and takes the mean v̄ over
    the old directions: left at zero, Adam would divide by almost nothing and leap there.
    The rule keeps V non-negative, and its sum along the axis if both bases span the same space.

    Args:
      V: second moments in low-rank coordinates, non-negative, any dtype.
      C_of_axis: for each projected axis of V its (r', r) change of coordinates.

    Returns:
      Shape and dtype of V.
    """
    out = V.astype(jnp.float32)
    for axis, C in C_of_axis.items():
        W = C * C
        unseen = jnp.clip(1.0 - jnp.sum(W, axis=1), 0.0, 1.0)
        W = W + unseen[:, None] / C.shape[1]
        out = jnp.moveaxis(jnp.tensordot(W, out, axes=(1, axis)), 0, axis)
    return out.astype(V.dtype)
