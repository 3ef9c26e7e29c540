"""The leading singular value of an update: found by power iteration, and clipped."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.dither import STRIDES, dither
from natgalore_jax._src.kernels.factored_update import (
    FactoredUpdate,
    Products,
    on_axes_of_gradient,
    place_phi,
    place_update,
    side_axes,
    whole,
)
from natgalore_jax._src.kernels.kernel import kernel
from natgalore_jax._src.kernels.projection import Factors
from natgalore_jax._src.params.plan import LeafPlan

# Divisors are at least the smallest normal number.
_TINY = float(jnp.finfo(jnp.float32).tiny)


@kernel("plan")
def clip_leading(plan: LeafPlan, U: jax.Array, limit: jax.typing.ArrayLike) -> jax.Array:
    """``U − (1 − c √max(m, n) / σ₁)₊ x xᵀ U / ‖x‖²`` with ``x = U Uᵀ s``, ``σ₁ = ‖Uᵀx‖ / ‖x‖``.

    One power iteration from fixed random numbers s: exact for rank one. Otherwise σ₁ is too small,
    the more so the nearer the second singular value is. It is a contraction whatever x is, so that
    no singular value grows.

    Args:
      plan: of matrices.
      U: of any size; sums of its rows and columns must be finite.
      limit: c.
    """
    dtype, (rows, cols) = U.dtype, plan.modes
    # Computed once: each reading of U would repeat what U is made of.
    U = jax.lax.optimization_barrier(U)
    U = U.astype(jnp.promote_types(dtype, jnp.float32))  # float64 stays: most pass unchanged
    s = on_axes_of_gradient(side_axes(plan, 0), _start(plan))
    y = jnp.sum(s * U, rows, keepdims=True)
    x = _unit(jnp.sum(U * (y / _magnitude(y, cols)), cols, keepdims=True), rows)
    y = jnp.sum(x * U, rows, keepdims=True)
    excess = _excess(x, y, rows, cols, limit * math.sqrt(max(plan.mode_sizes)))
    return (U - excess * y).astype(dtype)


def clip_leading_of_factored(
    plan: LeafPlan,
    factors: Factors,
    update: FactoredUpdate,
    G: jax.Array,
    limit: jax.typing.ArrayLike,
) -> jax.Array:
    """:func:`clip_leading` of ``U = P L + φ G``, which is computed once, at the end.

    Args:
      plan, factors, update, G: of a matrix with one projected side.
      limit: c.

    Returns:
      U in full shape, float32.
    """
    of_rows, of_cols = side_axes(plan, 0), side_axes(plan, 1)
    update = place_update(plan, update, G)
    U = Products(plan, factors, update, G)
    s = jnp.broadcast_to(_start(plan), (*plan.batch_shape, *plan.mode_shape(0)))
    y = U.with_rows(place_phi(of_rows, s, G))
    x = U.with_columns(y / _magnitude(y, range(of_cols.batch_ndim, y.ndim)))
    x = _unit(x, range(of_rows.batch_ndim, x.ndim))
    y = on_axes_of_gradient(of_cols, U.with_rows(x))
    x = on_axes_of_gradient(of_rows, x)
    rows, cols = plan.modes
    excess = _excess(x, y, rows, cols, limit * math.sqrt(max(plan.mode_sizes)))
    return whole(plan, factors, update, G) - excess * y


def _start(plan: LeafPlan) -> jax.Array:
    """s of every matrix, a vector of rows with batch axes of length one.

    Uniform numbers, not signs, whose sum may be zero: they would miss a column of ones.
    """
    bits = dither((plan.mode_sizes[0], 1), 0, 0, STRIDES[0], first=0)
    s = bits.astype(jnp.float32) / 2.0**31 - 1.0
    return s.reshape((1,) * len(plan.batch) + plan.mode_shape(0))


def _unit(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """x over its largest entry: its squares do not overflow."""
    return x / jnp.maximum(jnp.max(jnp.abs(x), axes, keepdims=True), _TINY)


def _magnitude(y: jax.Array, axes: Sequence[int]) -> jax.Array:
    """A power of two near the largest entry of y: divided by it, y has the same digits."""
    info = jnp.finfo(y.dtype)
    largest = jnp.max(jnp.abs(y), axes, keepdims=True)
    # Halved, because rounding up could overflow. The results do not depend on the power.
    power = jax.lax.reduce_precision(largest / 2, info.nexp, 0)
    return jax.lax.stop_gradient(jnp.maximum(power, float(info.tiny)))


def _excess(
    x: jax.Array,
    y: jax.Array,
    x_axes: Sequence[int],
    y_axes: Sequence[int],
    bound: jax.typing.ArrayLike,
) -> jax.Array:
    """``(1 − bound / σ)₊ x / ‖x‖²`` with ``σ = ‖y‖ / ‖x‖``, y the product of U with x."""
    x_squared = jnp.maximum(jnp.sum(jnp.square(x), x_axes, keepdims=True), _TINY)
    unit = _magnitude(y, y_axes)
    norm = unit * jnp.sqrt(jnp.sum(jnp.square(y / unit), y_axes, keepdims=True) / x_squared)
    return jnp.where(norm > bound, 1.0 - bound / norm, 0.0) / x_squared * x
