"""Residual update: ``E = G − P Pᵀ G``, rescaled by a rule and added back.

For one parameter: N and R have the low-rank shape, G the full shape, φ the shape that
:mod:`.factored_update` says.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.factored_update import (
    FactoredUpdate,
    PhiAxes,
    phi_axes,
    sum_for_phi,
)
from natgalore_jax._src.kernels.projection import rounding_error
from natgalore_jax._src.kernels.stacks import Apart, read
from natgalore_jax._src.params.placement import place_like
from natgalore_jax._src.params.plan import LeafPlan

Rule = Literal["none", "fira", "fisher"]

# δ: the share of a column's mean squared gradient that is added to its Fisher entry. Without it the
# rounding errors of a column inside the subspace would be amplified to the size of an update.
FISHER_DAMPING = 1e-4

# κ: the energy of a gradient enters the average as at most this multiple of the average. Updates
# stay near σ after a spike; a lasting change is followed within a few steps, because the average
# may nearly double in each.
SPIKE = 10.0


class Residual(NamedTuple):
    """The arguments of ``project_back`` about the residual."""

    rule: Rule
    scale: jax.typing.ArrayLike  # σ
    decay: jax.typing.ArrayLike  # β
    norm_growth_limit: jax.typing.ArrayLike | None  # γ

    @property
    def keeps_norm(self) -> bool:
        """Whether the limit needs the norm of the last update in the state."""
        return self.norm_growth_limit is not None and RULES[self.rule].rms is None


class Energies(NamedTuple):
    """Sums of squares over the axes that φ lacks, float32, in the shape of φ."""

    R: jax.Array
    G: jax.Array
    #: ``‖g − P Pᵀ g‖² = ‖g‖² − ‖Pᵀ g‖²``, because P is orthonormal. Infinite where ‖g‖² is, so that
    #: rules give φ = 0: a residual whose squares overflow (entries beyond 1e19) is left out.
    E: jax.Array


class RuleInputs(NamedTuple):
    """Inputs of a residual rule for one parameter."""

    settings: Residual
    axes: PhiAxes
    size: int  # entries of G for each entry of φ
    N: jax.Array
    energy: Energies
    rounding: float  # error of ‖E_:j‖² as a share of ‖G_:j‖²


class ResidualRule(NamedTuple):
    """Rule of the residual update; a new rule is an entry of ``RULES`` and a name in ``Rule``."""

    phi: Callable[[RuleInputs, Any], tuple[jax.Array, Any]]  # (inputs, memory) -> (φ, memory)
    scale: float  # default σ
    rms: float | None  # of E diag(φ), if the rule fixes it: the limit then needs no memory
    has_memory: bool = False  # c of :func:`empty_fisher`


def _fira(x: RuleInputs, memory: Any) -> tuple[jax.Array, Any]:
    """``‖N_:j‖ / ‖R_:j‖``."""
    return gain(jnp.sum(jnp.square(x.N), x.axes.low), x.energy.R), memory


def _fisher(x: RuleInputs, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``1 / √(c_j + δ mean_i G_ij²)`` with c the average of ``mean_i E_ij²``."""
    mean_square = x.energy.E / x.size
    if x.settings.norm_growth_limit is not None:
        mean_square = without_spike(x.axes, mean_square, c)
    c = average(c, mean_square, x.settings.decay)
    return inverse_root(c + (FISHER_DAMPING + x.rounding) / x.size * x.energy.G), c


def with_residual(
    settings: Residual,
    plan: LeafPlan,
    scale: jax.typing.ArrayLike,
    direction: jax.Array,
    N: jax.Array,
    R: jax.Array,
    G: jax.Array | Apart,
    *,
    last_norm: Any,
    fisher: Any,
    basis_error: float = 0.0,
) -> tuple[FactoredUpdate, Any, Any]:
    """``U = α P N + σ E φ = P (α N − σ φ R) + σ φ G``: one product, as without residual.

    Args:
      settings, plan: of the parameter.
      scale: α.
      direction: batch, the sign of the residual update.
      N, R, G: the inner update, the low-rank gradient, the gradient.
      last_norm: the norm of the last residual update; MaskedNode unless ``settings.keeps_norm``.
      fisher: the memory of the rule, c of the last step; MaskedNode for a rule without memory.
      basis_error: the share of a column's energy that rounding of P moves into E without changing
        ‖g‖² − ‖Pᵀ g‖²; it is added to δ.

    Returns:
      U, and the new norm and Fisher entries.
    """
    axes = phi_axes(plan)
    # Of a square twice that of a number, where one entry of a column of R counts.
    rounding = basis_error + 2 * math.sqrt(rounding_error(R.dtype))
    N, R = (x.astype(jnp.float32) for x in (N, R))
    energy, rule = energies(axes, R, G), RULES[settings.rule]
    size = math.prod(plan.shape[a] for a in axes.full)
    phi, fisher = rule.phi(RuleInputs(settings, axes, size, N, energy, rounding), fisher)
    phi = jnp.multiply(settings.scale, phi)
    if settings.norm_growth_limit is not None:
        level = last_norm
        if rule.rms is not None:
            entries = math.prod(plan.shape[a] for mode in plan.modes for a in mode)
            level = jnp.abs(settings.scale) * (rule.rms * math.sqrt(entries))
        phi, norm = limited(axes, phi, energy, level, settings.norm_growth_limit)
        last_norm = norm if settings.keeps_norm else last_norm
    phi = phi * jnp.expand_dims(direction, tuple(range(axes.batch_ndim, phi.ndim)))
    low = jnp.multiply(scale, N) - jnp.expand_dims(phi, axes.low) * R
    return FactoredUpdate(low, phi), last_norm, fisher


def empty_fisher(plan: LeafPlan, low_rank: Any) -> jax.Array:
    """c before the first gradient: zeros, sharded as the low-rank leaf."""
    return jnp.sum(optax.tree.zeros_like(low_rank, dtype=jnp.float32), phi_axes(plan).low)


def fisher_shape(plan: LeafPlan) -> tuple[int, ...]:
    """The shape of c."""
    return tuple(plan.shape[a] for a in phi_axes(plan).owners)


# σ of "fisher" is twice the root mean square of AdamW's updates.
RULES = {
    "fira": ResidualRule(_fira, scale=1.0, rms=None),
    "fisher": ResidualRule(_fisher, scale=0.4, rms=1.0, has_memory=True),
}


def energies(axes: PhiAxes, R: jax.Array, G: jax.Array | Apart) -> Energies:
    of_R = jnp.sum(jnp.square(R), axes.low)
    of_G = read(lambda G: sum_for_phi(axes, jnp.square(G.astype(jnp.float32))), G)
    of_G = place_like(of_G, of_R)
    difference = jnp.where(jnp.isinf(of_G), of_G, of_G - of_R)
    # A NaN must reach the update, and XLA's maximum on CPUs may ignore it: use where.
    return Energies(of_R, of_G, jnp.where(difference < 0, 0.0, difference))


def gain(energy_N: jax.Array, energy_R: jax.Array) -> jax.Array:
    """``‖N‖ / ‖R‖``, from the squares; 0 where R is 0 or squares overflow."""
    unseen = (energy_R == 0) | jnp.isinf(energy_R) | jnp.isinf(energy_N)
    return jnp.sqrt(jnp.where(unseen, 0.0, energy_N / jnp.where(unseen, 1.0, energy_R)))


def average(c: jax.Array, new: jax.Array, decay: jax.typing.ArrayLike) -> jax.Array:
    """``β c + (1 − β) c'``, starting at the first non-zero c'; non-finite c' are skipped."""
    mixed = new + jnp.where(c > 0, decay, 0.0) * (c - new)
    return jnp.where(jnp.isfinite(new), mixed, c)


def inverse_root(c: jax.Array) -> jax.Array:
    """``c^(−1/2)``, and 0 of 0."""
    return jnp.where(c == 0, 0.0, jax.lax.rsqrt(c))


def without_spike(axes: PhiAxes, new: jax.Array, c: jax.Array) -> jax.Array:
    """``new`` with its sum over a matrix limited to κ times the sum of ``c``."""
    matrix = tuple(range(axes.batch_ndim, c.ndim))
    old_sum, new_sum = (jnp.sum(x, matrix, keepdims=True) for x in (c, new))
    is_spike = (old_sum > 0) & (new_sum > SPIKE * old_sum) & jnp.isfinite(new_sum)
    return new * jnp.where(is_spike, SPIKE * old_sum / new_sum, 1.0)


def limited(
    axes: PhiAxes,
    phi: jax.Array,
    energy: Energies,
    level: jax.typing.ArrayLike,
    limit: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """φ that limits the norm of the residual update to ``limit`` times ``level``; that norm."""
    matrix = tuple(range(axes.batch_ndim, phi.ndim))
    squared = jnp.where(phi == 0, 0.0, jnp.square(phi) * energy.E)
    shrink, norm = growth_shrink(jnp.sqrt(jnp.sum(squared, matrix)), level, limit)
    return phi * jnp.expand_dims(shrink, matrix), norm


def growth_shrink(
    norm: jax.Array, level: jax.typing.ArrayLike, limit: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """``min(1, γ ℓ / ‖U‖)`` for the norm of an update U and a level ℓ, and the norm after it.

    1 if ℓ is 0. A norm that is not finite leaves the level for the next step.
    """
    level = jnp.asarray(level)
    allowed = limit * level
    is_over = (level > 0) & (norm > allowed)
    # No division by zero where it is not taken: its derivative would be NaN.
    shrink = jnp.where(is_over, allowed / jnp.where(is_over, norm, 1.0), 1.0)
    return shrink, jnp.where(jnp.isfinite(norm), norm * shrink, level).astype(jnp.float32)


def limit_growth(
    batch: Sequence[int], U: jax.Array, last_norm: jax.Array, limit: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """``U ← U · min(1, γ ‖U'‖ / ‖U‖)`` for each matrix, U' its previous update.

    Args:
      batch: the axes of independent matrices.
      U: float32, the updates.
      last_norm: batch, ``‖U'‖``; no limit if it is zero.
      limit: γ.

    Returns:
      The limited updates and their norms.
    """
    others = [a for a in range(U.ndim) if a not in batch]
    norm = jnp.sqrt(jnp.sum(jnp.square(U), tuple(others)))
    shrink, norm = growth_shrink(norm, last_norm, limit)
    return U * jnp.expand_dims(shrink, others), norm
