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
from natgalore_jax._src.params.placement import place_low_rank
from natgalore_jax._src.params.plan import LeafPlan

# Divisors are at least the smallest normal number.
_TINY = float(jnp.finfo(jnp.float32).tiny)
# Each reads the update twice. In AdamW's training at nano, σ₁ of a step's updates is too small by
# 6 to 35 % after one in the median, after two by 0 to 8 %, after three by 0 to 3 %, after four by 0
# to 1 %.
_ITERATIONS = 4


def clip_each(plan: LeafPlan, operands: tuple[jax.Array], limit: jax.typing.ArrayLike):
    """:func:`clip_leading` of one parameter, in a tuple."""
    return (clip_leading(plan, *operands, limit),)


def clip_leading(plan: LeafPlan, U: jax.Array, limit: jax.typing.ArrayLike) -> jax.Array:
    """``U − (1 − c √max(m, n) / σ₁)₊ x xᵀ U / ‖x‖²`` with ``x = (U Uᵀ)⁴ s``, ``σ₁ = ‖Uᵀx‖ / ‖x‖``.

    Four power iterations from fixed random numbers s: exact for rank one. Otherwise σ₁ is too
    small, the more so the nearer the second singular value is. It is a contraction whatever x is,
    so that no singular value grows.

    Args:
      plan: of matrices.
      U: of any size; sums of its rows and columns must be finite.
      limit: c.
    """
    dtype, (rows, cols) = U.dtype, plan.modes
    # Computed once: each reading of U would repeat what U is made of.
    U = jax.lax.optimization_barrier(U)
    U = U.astype(jnp.promote_types(dtype, jnp.float32))  # float64 stays: most pass unchanged
    x = on_axes_of_gradient(side_axes(plan, 0), _start(plan, 0))
    for _ in range(_ITERATIONS):
        y = jnp.sum(x * U, rows, keepdims=True)
        x = jnp.sum(U * (y / _magnitude(y, cols)), cols, keepdims=True)
        x = x / _magnitude(x, rows)
    y = jnp.sum(x * U, rows, keepdims=True)
    bound = limit * math.sqrt(max(plan.mode_sizes))
    excess = _excess(x, y, _magnitude(y, cols), rows, cols, bound)
    return (U - excess * y).astype(dtype)


def clip_leading_of_factored(
    plan: LeafPlan,
    factors: Factors,
    update: FactoredUpdate,
    inside: jax.Array,
    G: jax.Array | Apart,
    limit: jax.typing.ArrayLike,
) -> FactoredUpdate:
    """:func:`clip_leading` of ``U = P L + φ G``, which is not computed, from another start.

    With the projected side as rows, ``x = U k`` and ``k = t + AᵀA t / ‖AᵀA t‖`` with fixed random
    numbers t, ‖t‖ near one, so that G is read twice, not three times. ``A = PᵀU + φ PᵀG`` has the
    leading directions of U inside the subspace, and of those outside the ones that G has inside
    too; t is for the others.

    Args:
      plan, factors, update, G: of a matrix with one projected side; G only has to be read.
      inside: PᵀU.
      limit: c.
    """
    (mode,) = plan.projected_modes
    of_projected, of_kept = side_axes(plan, mode), side_axes(plan, 1 - mode)
    update = place_update(plan, update, any_of(G))
    A = 2 * place_low_rank(plan, inside, any_of(G)) - update.low  # L = PᵀU − φ PᵀG
    U, nb = Products(plan, factors, update, G), len(plan.batch)
    A = A / _magnitude(A, range(nb, A.ndim))  # AᵀA t does not overflow
    t = _start(plan, 1 - mode) * math.sqrt(3 / plan.mode_sizes[1 - mode])
    t = jnp.broadcast_to(t, (*plan.batch_shape, *plan.mode_shape(1 - mode)))
    t = place_phi(of_kept, t, any_of(G))
    w = U.from_rank(A, U.to_rank(A, t))
    own = range(nb, w.ndim)
    k = t + w * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(w), own, keepdims=True), _TINY))
    x = U.with_kept(k)
    unit = _magnitude(x, range(nb, x.ndim))
    x = x / unit
    x, y, unit = (
        on_axes_of_gradient(of_projected, x),
        on_axes_of_gradient(of_kept, U.with_projected(x)),
        on_axes_of_gradient(of_projected, unit),
    )
    bound = limit * math.sqrt(max(plan.mode_sizes))
    excess = _excess(x, y, unit, plan.modes[mode], plan.modes[1 - mode], bound)
    return update._replace(clipped=(excess, y))


def _start(plan: LeafPlan, mode: int) -> jax.Array:
    """Fixed random numbers: a vector of rows (mode 0) or columns, with batch axes of length one.

    Uniform numbers, not signs, whose sum may be zero: they would miss a column of ones.
    """
    bits = dither((plan.mode_sizes[mode], 1), 0, 0, STRIDES[0], first=0)
    s = bits.astype(jnp.float32) / 2.0**31 - 1.0
    return s.reshape((1,) * len(plan.batch) + plan.mode_shape(mode))


def _magnitude(y: jax.Array, axes: Sequence[int]) -> jax.Array:
    """A power of two near the largest entry of a product of U, the unit of U in what follows.

    Numbers have the same digits in any unit that is a power of two.
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
