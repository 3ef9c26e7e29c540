"""Updates before they have their full shape: ``U = P L + φ G − X Yᵀ``.

For one parameter: L has the low-rank shape, G the full shape. φ has one number for each column of a
matrix if the rows are projected, for each row if the columns are projected, and for the whole
matrix if both sides are projected, or for Tucker.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.projection import Factors, project_back
from natgalore_jax._src.params.placement import (
    has_explicit_sharding,
    names_of,
    place_low_rank,
    placed,
)
from natgalore_jax._src.params.plan import LeafPlan


class PhiAxes(NamedTuple):
    """The axes of φ: batch axes, then axes of the unprojected side."""

    owners: tuple[int, ...]  # axes of G that φ has, in φ's order
    low: tuple[int, ...]  # axes of R that φ lacks
    full: tuple[int, ...]  # axes of G that φ lacks
    batch_ndim: int


class FactoredUpdate(NamedTuple):
    """``U = P L + φ G − X Yᵀ``."""

    low: jax.Array  # L, low-rank shape
    phi: jax.Array | None = None  # None: without φ G
    # Pairs of columns of X and Y, with the axes of G.
    clipped: tuple[tuple[jax.Array, jax.Array], ...] = ()


def phi_axes(plan: LeafPlan, *, by_channel: bool = True) -> PhiAxes:
    """Axes of a φ with one number per channel if the plan allows it, else one per matrix."""
    nb = len(plan.batch)
    if by_channel and plan.is_one_sided:
        (mode,) = plan.projected_modes
        kept = plan.modes[1 - mode]
        low: tuple[int, ...] = (nb + plan.low_rank_axes[mode],)
    else:
        kept, low = (), tuple(range(nb, len(plan.low_rank_shape)))
    owners = (*plan.batch, *kept)
    full = tuple(a for a in range(len(plan.shape)) if a not in owners)
    return PhiAxes(owners, low, full, nb)


def on_axes_of_gradient(axes: PhiAxes, phi: jax.Array) -> jax.Array:
    """φ with as many axes as G, for broadcasting."""
    in_place = phi.transpose([axes.owners.index(a) for a in sorted(axes.owners)])
    return jnp.expand_dims(in_place, axes.full)


def sum_for_phi(axes: PhiAxes, G: jax.Array) -> jax.Array:
    """Sums of G over the axes that φ lacks, in the shape of φ."""
    in_order = [sorted(axes.owners).index(a) for a in axes.owners]
    return jnp.sum(G, axes.full).transpose(in_order)


def place_phi(axes: PhiAxes, phi: jax.Array, G: jax.Array) -> jax.Array:
    """Shard what has the shape of φ for a product with G; no-op without explicit axes."""
    if not has_explicit_sharding(G):
        return phi
    return placed(phi, [names_of(G)[a] for a in axes.owners])


def place_update(plan: LeafPlan, update: FactoredUpdate, G: jax.Array) -> FactoredUpdate:
    """Shard both parts for products with G; no-op without explicit axes, and the second time."""
    phi = None if update.phi is None else place_phi(phi_axes(plan), update.phi, G)
    return update._replace(low=place_low_rank(plan, update.low, G), phi=phi)


def side_axes(plan: LeafPlan, mode: int) -> PhiAxes:
    """The axes of a vector of rows (mode 0) or columns, of a matrix."""
    owners = (*plan.batch, *plan.modes[mode])
    return PhiAxes(owners, (), plan.modes[1 - mode], len(plan.batch))


def whole(plan: LeafPlan, factors: Factors, update: FactoredUpdate, G: jax.Array) -> jax.Array:
    """U in full shape, in the dtype of L."""
    low, phi, clipped = place_update(plan, update, G)
    U = project_back(plan, low, factors)
    if phi is not None:
        U = U + on_axes_of_gradient(phi_axes(plan), phi) * G.astype(U.dtype)
    for x, y in clipped:
        U = U - x * y
    return U
