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
)
from natgalore_jax._src.kernels.projection import Factors
from natgalore_jax._src.kernels.stacks import Apart, any_of
from natgalore_jax._src.params.plan import LeafPlan

# Divisors are at least the smallest normal number.
_TINY = float(jnp.finfo(jnp.float32).tiny)


def clip_each(plan: LeafPlan, operands: tuple[jax.Array], limit: jax.typing.ArrayLike):
    """:func:`clip_leading` of one parameter, in a tuple."""
    return (clip_leading(plan, *operands, limit),)


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
    unit = _magnitude(y, cols)
    x = jnp.sum(U * (y / unit), cols, keepdims=True) / unit
    y = jnp.sum(x * U, rows, keepdims=True)
    excess = _excess(x, y, unit, rows, cols, limit * math.sqrt(max(plan.mode_sizes)))
    return (U - excess * y).astype(dtype)


def clip_leading_of_factored(
    plan: LeafPlan,
    factors: Factors,
    update: FactoredUpdate,
    G: jax.Array | Apart,
    limit: jax.typing.ArrayLike,
) -> FactoredUpdate:
    """:func:`clip_leading` of ``U = P L + φ G``, which is not computed.

    Args:
      plan, factors, update, G: of a matrix with one projected side; G only has to be read.
      limit: c.
    """
    of_rows, of_cols = side_axes(plan, 0), side_axes(plan, 1)
    update = place_update(plan, update, any_of(G))
    U = Products(plan, factors, update, G)
    s = jnp.broadcast_to(_start(plan), (*plan.batch_shape, *plan.mode_shape(0)))
    y = U.with_rows(place_phi(of_rows, s, any_of(G)))
    own = range(of_cols.batch_ndim, y.ndim)
    unit = _magnitude(y, own)
    x = U.with_columns(y / unit)
    x = x / jnp.expand_dims(unit.squeeze(own), range(of_rows.batch_ndim, x.ndim))
    y, unit = (on_axes_of_gradient(of_cols, z) for z in (U.with_rows(x), unit))
    x = on_axes_of_gradient(of_rows, x)
    rows, cols = plan.modes
    excess = _excess(x, y, unit, rows, cols, limit * math.sqrt(max(plan.mode_sizes)))
    return update._replace(clipped=(excess, y))


def _start(plan: LeafPlan) -> jax.Array:
    """s of every matrix, a vector of rows with batch axes of length one.

    Uniform numbers, not signs, whose sum may be zero: they would miss a column of ones.
    """
    bits = dither((plan.mode_sizes[0], 1), 0, 0, STRIDES[0], first=0)
    s = bits.astype(jnp.float32) / 2.0**31 - 1.0
    return s.reshape((1,) * len(plan.batch) + plan.mode_shape(0))


def _magnitude(y: jax.Array, axes: Sequence[int]) -> jax.Array:
    """A power of two near the largest entry of ``y = Uᵀ s``, the unit of U in what follows.

    Numbers have the same digits in any unit that is a power of two. ``x = U y`` in units of U and y
    is at least 1 / ‖s‖ long.
    """
    info = jnp.finfo(y.dtype)
    largest = jnp.max(jnp.abs(y), axes, keepdims=True)
    # Halved, because rounding up could overflow. The results do not depend on the power.
    power = jax.lax.reduce_precision(largest / 2, info.nexp, 0)
    return jax.lax.stop_gradient(jnp.maximum(power, float(info.tiny)))


def _excess(
    x: jax.Array,
    y: jax.Array,
    unit: jax.Array,
    x_axes: Sequence[int],
    y_axes: Sequence[int],
    bound: jax.typing.ArrayLike,
) -> jax.Array:
    """``(1 − bound / σ)₊ x / ‖x‖²`` with ``σ = ‖y‖ / ‖x‖``, y the product of U with x.

    With ``unit`` near ‖y‖ no square overflows.
    """
    x_squared = jnp.maximum(jnp.sum(jnp.square(x), x_axes, keepdims=True), _TINY)
    norm = unit * jnp.sqrt(jnp.sum(jnp.square(y / unit), y_axes, keepdims=True) / x_squared)
    return jnp.where(norm > bound, 1.0 - bound / norm, 0.0) / x_squared * x
