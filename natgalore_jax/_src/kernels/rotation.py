"""Moments and history in the coordinates of a new basis.

``C = P'ᵀ P`` (r, r) maps coordinates in P to coordinates in P'; its rows have norms of at most one.
Arrays are low-rank coordinates of one matrix, without batch axes.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

Transition = Literal["rotate", "reset", "keep"]


def change_of_basis(P_new: jax.Array, P: jax.Array, rounding: float = 0.0) -> jax.Array:
    """``C = P'ᵀ P`` between orthonormal bases, with rows of norm at most one.

    With such rows :func:`rotate_second_moment` takes weighted means, which never exceed the largest
    old value. Rounded bases are not orthonormal, and moments would grow at every change: each basis
    is replaced by its nearest orthonormal basis.

    Args:
      P_new: (m, r'), orthonormal, before it is rounded.
      P: (m, r), orthonormal up to rounding.
      rounding: relative mean square of the rounding error of P. Rows of C lack this share even if
        both bases span the same space; it does not count as a new direction.

    Returns:
      (r', r), float32.
    """
    C = _gram(P_new, P)
    if rounding:
        C = _gram(_inverse_root(_gram(P_new, P_new)), _gram(C.T, _inverse_root(_gram(P, P))))
    squared = jnp.sum(C * C, axis=1, keepdims=True)
    kept = jnp.minimum(squared + rounding, 1.0)
    return C * jnp.sqrt(kept / jnp.where(squared > 0, squared, 1.0))


def _gram(A: jax.Array, B: jax.Array) -> jax.Array:
    """``Aᵀ B``."""
    return jnp.matmul(A.T, B, precision="highest", preferred_element_type=jnp.float32)


def _inverse_root(S: jax.Array) -> jax.Array:
    """``S^(−1/2)`` of a symmetric matrix near the identity, by Newton's iteration."""

    def step(_, Z):
        return 1.5 * Z - 0.5 * _gram(Z, _gram(S, _gram(Z, Z)))

    # Converges for eigenvalues of 0.1 and above; PᵀP has 1 ± 0.2 in 4 bits. The first step starts
    # at the identity.
    first = 1.5 * jnp.eye(S.shape[0], dtype=S.dtype) - 0.5 * S
    return jax.lax.fori_loop(0, 7, step, first)


def _multiply(C: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """``x ×_a C``: multiply by C along one axis of x."""
    return jnp.moveaxis(jnp.tensordot(C, x, axes=(1, axis), precision="highest"), 0, axis)


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
        out = _multiply(C, out, axis)
    return out.astype(M.dtype)


def rotate_second_moment(V: jax.Array, C_of_axis: Mapping[int, jax.Array]) -> jax.Array:
    """``v'_i = Σ_j C_ij² v_j + (1 − Σ_j C_ij²) v̄`` along every projected axis.

    The variance of a sum of uncorrelated terms with weights C_ij is the sum with weights C_ij².
    The part of a new direction outside the old basis was never observed. At zero, Adam would divide
    by almost nothing there; therefore it takes the mean v̄ over the old directions. The rule keeps V
    non-negative, and preserves its sum along the axis if both bases span the same space.

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
        out = _multiply(W + unseen[:, None] / C.shape[1], out, axis)
    return out.astype(V.dtype)


def rotate_centred(
    V: jax.Array, mean: jax.Array, new_mean: jax.Array, C_of_axis: Mapping[int, jax.Array]
) -> jax.Array:
    """``v'_i = κ μ'_i² + Σ_j C_ij² (v_j − κ μ_j²) + (1 − Σ_j C_ij²) v̄`` with ``κ = min v / μ²``.

    Variances follow :func:`rotate_second_moment`, and the square of the new mean is added: rotating
    V itself can give less than ``(C μ)²``. κ is 1 or more: where both moments are divided by
    1 − βᵗ before use, a variance of zero is ``v = μ² / (1 − βᵗ)``.

    Args:
      V, mean: second and first moments in the old coordinates, ``V ≥ mean²``.
      new_mean: first moments in the new coordinates, as they are stored.
      C_of_axis: as in :func:`rotate_second_moment`.

    Returns:
      Shape and dtype of V.
    """
    mean, new_mean, total = (x.astype(jnp.float32) for x in (mean, new_mean, V))
    square = mean * mean
    kappa = jnp.min(jnp.where(square > 0, total / jnp.where(square > 0, square, 1.0), jnp.inf))
    kappa = jnp.where(jnp.isfinite(kappa), jnp.maximum(kappa, 1.0), 1.0)
    variance = jnp.maximum(total - kappa * square, 0.0)
    for axis, C in C_of_axis.items():
        unseen = jnp.clip(1.0 - jnp.sum(C * C, axis=1), 0.0, 1.0)
        average = jnp.mean(variance + kappa * mean * mean, axis=axis, keepdims=True)
        shape = [-1 if a == axis else 1 for a in range(V.ndim)]
        variance = _multiply(C * C, variance, axis) + unseen.reshape(shape) * average
        mean = rotate_linear(mean, {axis: C})
    # ν ≥ μ² must survive rounding to the dtype of V: add two units of precision.
    square = kappa * new_mean * new_mean
    least = square * (1.0 + 2.0 * float(jnp.finfo(V.dtype).eps))
    return jnp.maximum(square + variance, least).astype(V.dtype)
