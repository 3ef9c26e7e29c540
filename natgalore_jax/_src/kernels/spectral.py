"""The leading singular value of an update: found by power iteration, and clipped."""

import math

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.dither import STRIDES, dither
from natgalore_jax._src.params.plan import LeafPlan

# Divisors are at least the smallest normal number.
_TINY = float(jnp.finfo(jnp.float32).tiny)


def clip_leading(plan: LeafPlan, U: jax.Array, limit: jax.typing.ArrayLike) -> jax.Array:
    """``U − (1 − c √max(m, n) / σ₁)₊ x xᵀ U / ‖x‖²`` with ``x = U Uᵀ s``, ``σ₁ = ‖Uᵀx‖ / ‖x‖``.

    One power iteration from fixed random numbers s: exact for rank one. Otherwise σ₁ is too small,
    the more so the nearer the second singular value is. It is a contraction whatever x is, so that
    no singular value grows.

    Args:
      plan: of matrices.
      U: float32 or float64, with singular values between 1e-19 and 1e19, or zero: x has their
        squares. Smaller ones are left as they are, for larger ones the result is not finite.
      limit: c.
    """
    rows, cols = plan.modes
    # Uniform numbers, not signs, whose sum may be zero: they would miss a column of ones.
    bits = dither((plan.mode_sizes[0], 1), 0, 0, STRIDES[0], first=0)
    s = bits.astype(jnp.float32) / 2.0**31 - 1.0
    s = s.reshape([plan.shape[a] if a in rows else 1 for a in range(U.ndim)])
    y = jnp.sum(s * U, rows, keepdims=True)
    x = jnp.sum(U * y, cols, keepdims=True)
    x = x / jnp.maximum(jnp.max(jnp.abs(x), rows, keepdims=True), _TINY)
    y = jnp.sum(x * U, rows, keepdims=True)
    x_squared = jnp.maximum(jnp.sum(jnp.square(x), rows, keepdims=True), _TINY)
    norm = jnp.sqrt(jnp.sum(jnp.square(y), cols, keepdims=True) / x_squared)
    bound = limit * math.sqrt(max(plan.mode_sizes))
    excess = jnp.where(norm > bound, 1.0 - bound / norm, 0.0)
    return U - excess / x_squared * x * y
