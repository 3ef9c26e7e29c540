"""Updates before they have their full shape: ``U = P L + φ G − x yᵀ``.

For one parameter: L has the low-rank shape, G the full shape. φ has one number for each column of a
matrix if the rows are projected, for each row if the columns are projected, and for the whole
matrix if both sides are projected, or for Tucker.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.projection import Factors, Letters, project_back
from natgalore_jax._src.kernels.stacks import Apart, read
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
    """``U = P L + φ G − x yᵀ``."""

    low: jax.Array  # L, low-rank shape
    phi: jax.Array | None = None  # None: without φ G
    clipped: tuple[jax.Array, jax.Array] | None = None  # x and y, with the axes of G


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
    if clipped is not None:
        x, y = clipped
        U = U - x * y
    return U


class Products:
    """Products of ``U = P L + φ G``, of a matrix with one projected side, with vectors.

    The projected side is that of the rows here; L has an axis of the rank and the kept side. A
    vector has batch axes, then the axes of its side. U is not computed. Both parts are sharded by
    :func:`place_update`.
    """

    def __init__(
        self, plan: LeafPlan, factors: Factors, update: FactoredUpdate, G: jax.Array | Apart
    ) -> None:
        (mode,), index, (self._P,) = plan.projected_modes, Letters(plan), factors
        self._G = G
        self._low, self._phi = update.low.astype(jnp.float32), update.phi
        self._of_G, self._of_P = index.full, index.factor(mode)
        self._of_low, self._of_rank = index.arranged([mode]), index.batch + index.ranks[mode]
        self._projected, self._kept = (index.batch + index.modes[side] for side in (mode, 1 - mode))

    def with_projected(self, x: jax.Array) -> jax.Array:
        """``Uᵀ x``: a vector of the kept side."""
        z = _product(f"{self._projected},{self._of_P}->{self._of_rank}", x, self._P)
        y = self.from_rank(self._low, z)
        if self._phi is None:
            return y
        return y + self._phi * self._with_G(f"{self._projected},{self._of_G}->{self._kept}", x)

    def with_kept(self, y: jax.Array) -> jax.Array:
        """``U y``: a vector of the projected side."""
        z = self.to_rank(self._low, y)
        x = _product(f"{self._of_rank},{self._of_P}->{self._projected}", z, self._P)
        if self._phi is None:
            return x
        return x + self._with_G(f"{self._kept},{self._of_G}->{self._projected}", self._phi * y)

    def to_rank(self, A: jax.Array, y: jax.Array) -> jax.Array:
        """``A y`` for A of the shape of L: a vector of the rank."""
        return _product(f"{self._kept},{self._of_low}->{self._of_rank}", y, A)

    def from_rank(self, A: jax.Array, z: jax.Array) -> jax.Array:
        """``Aᵀ z``: a vector of the kept side."""
        return _product(f"{self._of_rank},{self._of_low}->{self._kept}", z, A)

    def _with_G(self, subscripts: str, x: jax.Array) -> jax.Array:
        return read(lambda G, x: _product(subscripts, x, G), self._G, x)


def _product(subscripts: str, vector: jax.Array, matrix: jax.Array) -> jax.Array:
    """``einsum`` of a vector and a matrix in float32, as a sum.

    A sum converts other dtypes entry by entry, where a product may store a converted matrix. On
    CPUs each product with a vector is code of its own, with 20 to 35 ms of compile time, and no
    faster than a sum whose operands are computed before.
    """
    of_vector, of_matrix, out = subscripts.replace("->", ",").split(",")
    vector, matrix = jax.lax.optimization_barrier((vector, matrix))

    def axes(letters: str) -> PhiAxes:
        owners = tuple(map(of_matrix.index, letters))
        full = tuple(a for a in range(matrix.ndim) if a not in owners)
        return PhiAxes(owners, (), full, len(set(of_vector) & set(out)))

    entries = on_axes_of_gradient(axes(of_vector), vector) * matrix.astype(jnp.float32)
    return sum_for_phi(axes(out), entries)
