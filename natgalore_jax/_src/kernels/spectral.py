"""The leading singular value of an update: found by power iteration, and clipped."""

import math

import jax
import jax.numpy as jnp

from natgalore_jax._src.params.plan import LeafPlan


def leading(plan: LeafPlan, U: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leading left singular vector x and ``Uᵀx`` of each matrix, whose norm is σ₁.

    One power iteration from fixed random numbers s: ``x = U Uᵀ s / ‖U Uᵀ s‖``. Exact for rank one;
    otherwise ``‖Uᵀx‖`` is too small, the more so the nearer the second singular value is.

    Args:
      plan: of matrices.
      U: float32.

    Returns:
      Two arrays with the axes of the parameter, of length one where they do not depend on an axis:
      batch and rows, batch and columns.
    """
    rows, cols = plan.modes
    # Not signs, whose sum is zero by chance: they would miss a column of ones.
    s = jax.random.normal(
        jax.random.key(0),
        [plan.shape[a] if a in rows else 1 for a in range(U.ndim)],
        jnp.float32,
    )
    y = _unit(jnp.sum(s * U, rows, keepdims=True), cols)
    x = _unit(jnp.sum(U * y, cols, keepdims=True), rows)
    return x, jnp.sum(x * U, rows, keepdims=True)


def clip_leading(plan: LeafPlan, U: jax.Array, limit: jax.typing.ArrayLike) -> jax.Array:
    """``U − (1 − c √max(m, n) / σ₁)₊ x xᵀ U``; zeros stay, non-finite U stay non-finite."""
    x, y = leading(plan, U)
    norm = _norm(y, plan.modes[1])
    bound = limit * math.sqrt(max(plan.mode_sizes))
    # A contraction, however good x is: no singular value grows.
    excess = jnp.where(norm > bound, 1.0 - bound / norm, 0.0)
    return U - excess * x * y


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Euclidean norm, without squares beyond the range of float32."""
    largest = jnp.max(jnp.abs(x), axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale), axes, keepdims=True))


def _unit(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    norm = _norm(x, axes)
    return x / jnp.where(norm > 0, norm, 1.0)
