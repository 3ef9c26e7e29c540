"""Refresh of LDAdam's subspace and moments, for all matrices of a parameter at once.

``P`` has the shape of a basis: batch, the axes of the projected mode, rank. ``M`` and ``V`` are in
low-rank coordinates. ``count`` is their number of steps, t − 1 in the paper.
"""

import functools
import math

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.fisher_factors import multiply
from natgalore_jax._src.kernels.orthonormal import ordered_polar_factor, shifted
from natgalore_jax._src.kernels.projection import Letters, contract, project, project_back
from natgalore_jax._src.kernels.random import normal
from natgalore_jax._src.params.placement import place_like, replicated, vary, varying_axes
from natgalore_jax._src.params.plan import LeafPlan

# Power steps of the first refresh.
FIRST_STEPS = 8
# Norm of random directions relative to the columns of P: without them a B whose image is orthogonal
# to P would never change P.
PROBE = 1e-4
# Entries of A: sums of 1e8 of its squares are float32.
LARGEST = 1e15


def next_basis(
    plan: LeafPlan,
    A: jax.Array,
    P: jax.Array,
    M: jax.Array,
    count: jax.Array,
    b1: jax.typing.ArrayLike,
    rho: jax.typing.ArrayLike,
) -> jax.Array:
    """``P' = polar(B Bᵀ (P + εΩ) D)`` with ``B = ρ P M̂ + (1 − ρ) A``; ``FIRST_STEPS`` at first.

    The weights D of :func:`natgalore_jax._src.kernels.orthonormal.ordered_polar_factor` order the
    columns as the paper's QR factorisation does.

    Args:
      plan: of a matrix with one projected side.
      A: shape of the parameter.
      P, M, count: of the last step.
      b1: decay of M, for its bias correction.
      rho: weight of the momentum.

    Returns:
      Shape and dtype of P; P itself for each matrix whose B is zero or non-finite.
    """
    (mode,), letters = plan.projected_modes, Letters(plan)
    P32, A, M = (x.astype(jnp.float32) for x in (P, A, M))
    rho = jnp.asarray(rho, jnp.float32)
    momentum = project_back(plan, M / _correction(b1, count), (P32,))
    B = jnp.where(count > 0, rho * momentum + (1 - rho) * A, A)
    # Squares of entries beyond 1e19 overflow float32, and squares below 1e-19 underflow.
    largest = jnp.max(jnp.abs(B), plan.matrix_axes, keepdims=True)
    B = B / jnp.where(largest > 0, largest, 1.0)

    def power_step(_, P):
        Z = project(plan, B, (P,))
        subscripts = f"{letters.full},{letters.arranged((mode,))}->{letters.factor(mode)}"
        Y = replicated(contract(subscripts, B, Z))
        last, Y = (x.reshape(plan.layers, -1, P.shape[-1]) for x in (replicated(P), Y))
        Q = jax.vmap(lambda Y, P: ordered_polar_factor(shifted(Y, P)))(Y, last)
        usable = jnp.any(Y != 0, (-2, -1), keepdims=True)
        usable &= jnp.all(jnp.isfinite(Q), (-2, -1), keepdims=True)
        new = jnp.where(usable, Q, replicated(P32).reshape(Y.shape)).reshape(P.shape)
        return place_like(new, P32)

    size = math.prod(plan.mode_shape(mode))
    key = jax.random.fold_in(jax.random.key(0), count)
    W = normal(key, P.shape[len(plan.batch) :]) / size**0.5
    start = P32 + PROBE * place_like(jnp.broadcast_to(W, P.shape), P32)
    with jax.default_matmul_precision("highest"):
        steps = jnp.where(count > 0, 1, FIRST_STEPS)
        start = vary(start, varying_axes((B, start)))
        return jax.lax.fori_loop(0, steps, power_step, start).astype(P.dtype)


def scaled_down(plan: LeafPlan, A: jax.Array) -> jax.Array:
    """A with a finite largest entry of each matrix beyond ``LARGEST`` scaled down to it."""
    own = tuple(axis for axis in range(A.ndim) if axis not in plan.batch)
    peak = jnp.max(jnp.abs(A.astype(jnp.promote_types(A.dtype, jnp.float32))), own, keepdims=True)
    is_large = (peak > LARGEST) & jnp.isfinite(peak)
    return (A * jnp.where(is_large, LARGEST / peak, 1.0)).astype(A.dtype)


def overlap(plan: LeafPlan, P_new: jax.Array, P: jax.Array) -> jax.Array:
    """``C = P'ᵀ P``, batch + (r, r), float32."""
    letters = Letters(plan)
    rows = letters.batch + letters.modes[plan.projected_modes[0]]
    return contract(
        f"{rows}X,{rows}Y->{letters.batch}XY", P_new, P, dtype=jnp.float32, precision="highest"
    )


def rotated_moments(
    plan: LeafPlan,
    C: jax.Array,
    M: jax.Array,
    V: jax.Array,
    count: jax.Array,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """``C M`` and ``(1 − β₂ᵗ⁻¹) |C² (V̂ − M̂²) + (C M̂)²|``, in the dtypes of M and V."""
    axis = plan.low_rank_axes[plan.projected_modes[0]]
    rotate = functools.partial(multiply, axis=axis, batch_ndim=len(plan.batch), precision="highest")

    M32, V32 = M.astype(jnp.float32), V.astype(jnp.float32)
    c2 = _correction(b2, count)
    M_hat, V_hat = M32 / _correction(b1, count), V32 / c2
    V_new = c2 * jnp.abs(rotate(C * C, V_hat - M_hat**2) + rotate(C, M_hat) ** 2)
    return rotate(C, M32).astype(M.dtype), V_new.astype(V.dtype)


def _correction(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """``1 − βᵗ``; 1 before the first step, when moments are zero."""
    return jnp.where(count > 0, 1 - jnp.asarray(decay, jnp.float32) ** count, 1.0)
