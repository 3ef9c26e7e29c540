"""One step of Alice, for all matrices of a parameter at once.

``U`` has the shape of a basis: batch, the axes of the projected mode, rank. ``G`` has the shape of
the parameter, ``R`` is its projection in low-rank coordinates. ``tracked`` is the average of
``R Rᵀ``, batch + (rank, rank), or a MaskedNode without tracking.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.basis import is_usable
from natgalore_jax._src.kernels.factored_update import FactoredUpdate, phi_axes, whole
from natgalore_jax._src.kernels.fisher_factors import gram
from natgalore_jax._src.kernels.projection import project
from natgalore_jax._src.kernels.random import normal
from natgalore_jax._src.kernels.residual import energies, inverse_root, limited
from natgalore_jax._src.params.placement import place_like, replicated, vary, varying_axes
from natgalore_jax._src.params.plan import LeafPlan


class Switch(NamedTuple):
    """Settings of the switch of a basis."""

    leading: int | None  # l
    b3: float  # β₃


def leading_kept(m: int, r: int, leading: int | None) -> int:
    """Number of leading eigenvectors that are kept: l, clipped to at most r, at least 2r − m."""
    return max(min(5 * r // 16 if leading is None else leading, r), 2 * r - m)


def switched_basis(
    plan: LeafPlan,
    switch: Switch,
    due: jax.Array,
    keys: jax.Array,
    G: jax.Array,
    U: jax.Array,
    tracked: Any,
) -> jax.Array:
    """New bases: leading eigenvectors, and samples of a basis of their complement.

    Args:
      plan: of a matrix whose shorter side is projected.
      switch: settings.
      due: whether all matrices are due for a refresh. The first refresh of a matrix is at its first
        finite, non-zero gradient.
      keys: a random key for each matrix.
      G, U, tracked: the gradient, and the state of the last step. U is zero before the first basis.

    Returns:
      Shape and dtype of U. A matrix with a zero or non-finite gradient keeps its basis.
    """
    mode, r = plan.projected_modes[0], U.shape[-1]
    order = (*plan.batch, *plan.modes[mode], *plan.modes[1 - mode])
    m = plan.mode_sizes[mode]
    matrices = replicated(G).transpose(order).reshape(plan.layers, m, -1)
    bases = replicated(U).reshape(plan.layers, m, r)
    if isinstance(tracked, optax.MaskedNode):
        tracked = jnp.zeros((plan.layers, 1, 1), jnp.float32)
    tracked = replicated(tracked).reshape(plan.layers, *tracked.shape[-2:])

    def of_one(arrays):
        key, G, U, tracked = vary(arrays, varying_axes(arrays))
        is_first = jnp.all(U == 0)

        def new():
            P = _switched(switch, key, G.astype(jnp.float32), U.astype(jnp.float32), tracked)
            return jnp.where(jnp.all(jnp.isfinite(P)), P, U.astype(jnp.float32)).astype(U.dtype)

        return jax.lax.cond((due | is_first) & is_usable(G), new, lambda: U)

    # vmap would turn cond into select and need the memory of all matrices: loop.
    new = jax.lax.map(of_one, (keys, matrices, bases, tracked))
    return place_like(new.reshape(U.shape), U)


def _switched(switch, key, G, U, tracked):
    """The new basis of one matrix: (m, n), (m, r), (r, r) and (m, r), all float32."""
    m, r = U.shape
    kept = leading_kept(m, r, switch.leading)
    # Products of squares leave the range of float32 for gradients below 1e-9 or above 1e9.
    size = jnp.maximum(jnp.max(jnp.abs(G)), jnp.sqrt(jnp.max(jnp.abs(tracked))))
    G, tracked = G / size, tracked / jnp.square(size)
    with jax.default_matmul_precision("highest"):
        eigenvectors = jax.lax.cond(
            jnp.all(U == 0),
            lambda: jnp.linalg.eigh(G @ G.T)[1][:, ::-1][:, :r],
            lambda: _subspace_iteration(switch.b3, G, U, tracked),
        )
        # LAPACK's signs depend on rounding, and the moments keep their coordinates.
        largest = jnp.argmax(jnp.abs(eigenvectors), axis=0)
        signs = jnp.sign(jnp.take_along_axis(eigenvectors, largest[None], axis=0))
        eigenvectors = eigenvectors * signs
        if kept == r:
            return eigenvectors
        complement = jnp.linalg.qr(eigenvectors, mode="complete")[0][:, r:]
    chosen = complement[:, sampled(key, m - r, r - kept)]
    return jnp.concatenate([eigenvectors[:, :kept], chosen], axis=1)


def _subspace_iteration(b3, G, U, tracked):
    """Eigenvectors of ``Q = β₃ U Q̃ Uᵀ + (1 − β₃) G Gᵀ`` within one power step, largest first.

    Q (m, m) is not formed.
    """

    def times(X):
        of_gradient = (1 - b3) * (G @ (G.T @ X))
        return of_gradient + b3 * (U @ (tracked @ (U.T @ X))) if b3 > 0 else of_gradient

    basis = jnp.linalg.qr(times(U))[0]
    _, rotation = jnp.linalg.eigh(basis.T @ times(basis))
    return basis @ rotation[:, ::-1]


def sampled(key: jax.Array, total: int, number: int) -> jax.Array:
    """``number`` of ``total`` indices, uniformly without replacement."""
    return jax.lax.top_k(normal(key, (total,)), number)[1]


def low_rank_step(plan, b3, decays, eps, G, U, M, V, tracked):
    """``R = Uᵀ G``, its moments and ``R Rᵀ`` averaged, and ``ω = M / (√V + ε)``."""
    b1, b2 = decays
    R = project(plan, G, (U,), jnp.float32)
    if not isinstance(tracked, optax.MaskedNode):
        axis = plan.low_rank_axes[plan.projected_modes[0]]
        new = gram(R, axis, len(plan.batch), diagonal=False)
        usable = jnp.all(jnp.isfinite(new), (-2, -1), keepdims=True)
        tracked = jnp.where(usable, b3 * tracked + (1 - b3) * new, tracked)
    M32 = b1 * M.astype(jnp.float32) + (1 - b1) * R
    V32 = b2 * V.astype(jnp.float32) + (1 - b2) * jnp.square(R)
    omega = M32 / (jnp.sqrt(V32) + eps)
    return R, omega, M32.astype(M.dtype), V32.astype(V.dtype), tracked


def compensated(plan, numbers, b1, G, U, R, omega, residual_energy, last_norm):
    """``α (U ω + α_c C)`` and the state of C, by ``U (ω − α_c R φ) + α_c G φ``: one product."""
    scale, compensation_scale, limit = numbers
    dtype, axes = G.dtype, phi_axes(plan)
    G = G.astype(jnp.float32)
    energy = energies(axes, R, G)
    new = (b1 * residual_energy + (1 - b1) * energy.E).astype(residual_energy.dtype)
    usable = jnp.all(jnp.isfinite(new), tuple(range(len(plan.batch), new.ndim)), keepdims=True)
    (mode,) = plan.projected_modes
    free = plan.mode_sizes[mode] - plan.rank_of(mode)
    phi = math.sqrt(free) * inverse_root(new)
    if limit is not None:
        phi, last_norm = limited(axes, phi, energy, last_norm, limit)
    phi = compensation_scale * phi
    low = omega - jnp.expand_dims(phi, axes.low) * R
    step = whole(plan, (U,), FactoredUpdate(low, phi), G)
    return (scale * step).astype(dtype), jnp.where(usable, new, residual_energy), last_norm
