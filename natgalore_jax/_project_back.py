"""Updates out of the subspace, with or without what the subspace missed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._contract import project_back as back
from natgalore_jax._plan import LeafPlan
from natgalore_jax._refresh import Factors
from natgalore_jax._validate import check_boolean, check_number


class ProjectBackState(NamedTuple):
    """State of :func:`project_back` with a residual."""

    # shape (), float32: +1 if the inner updates point along the gradient, −1 if they already
    # descend, 0 while no update told.
    direction: jax.Array
    # The tree of parameters: batch, float32, the norm of each matrix's last residual update,
    # or MaskedNode where nothing is projected or there is no limit.
    residual_norm: Any


class ProjectBack(optax.GradientTransformationExtraArgs):
    """What :func:`project_back` returns: it closes a subspace in :func:`natgalore_jax.chain`."""

    scale: float
    residual: bool
    norm_growth_limit: float | None


def project_back(
    scale: float = 1.0, residual: bool = False, norm_growth_limit: float | None = 1.01
) -> ProjectBack:
    r"""Takes low-rank updates back to the shapes of the parameters.

    .. math:: U = \alpha P N, \qquad \alpha N Q^\top, \qquad\text{or}\qquad \alpha P N Q^\top,

    where N is what the transformations inside the subspace made of R. With ``residual`` the part
    of the gradient outside the subspace is added, at the size that the inner optimizer would have
    given it:

    .. math:: U = \alpha P N + (G - P P^\top G)\,\varphi, \qquad
       \varphi_j = \lVert N_{:j} \rVert / \lVert R_{:j} \rVert,

    with φ per column if the rows are projected, per row if the columns are, and one number for the
    whole matrix if both sides are (the same for Tucker). α does not act on the residual. If the
    inner updates already descend (a learning rate inside the subspace), the residual takes their
    sign, found at the first update that is not zero.

    Args:
      scale: α, a number or a traced scalar. GaLore uses 0.25 with a learning rate of 0.01.
      residual: whether to add the residual. It needs no memory and no product
        beyond those without it.
      norm_growth_limit: γ; the norm of a matrix's residual update may grow by at most this factor
        from one step to the next, which tames spikes of the loss. None: no limit. Put the learning
        rate after ``project_back``, or its warm-up is limited as well.

    Returns:
      A transformation for :func:`natgalore_jax.chain`; its state is empty without a residual.

    Raises:
      TypeError, ValueError: for an argument of a wrong type, or ``norm_growth_limit`` ≤ 1.

    References:
      GaLore (2024), algorithm 2, for α; Fira (2024), equations 7 to 9, for φ and the limit.

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> tx = ng.chain(ng.low_rank_project(rank=2), ng.project_back(scale=0.5, residual=True))
      >>> grads = {"w": jnp.arange(20.0).reshape(4, 5) ** 2}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].shape
      (4, 5)
    """
    check_number("scale", scale)
    check_boolean("residual", residual)
    if norm_growth_limit is not None:
        check_number("norm_growth_limit", norm_growth_limit, above=1.0)
    tx = ProjectBack(_outside_of_chain, _outside_of_chain)
    tx.scale, tx.residual, tx.norm_growth_limit = scale, residual, norm_growth_limit
    return tx


def _outside_of_chain(*args: Any, **kwargs: Any) -> Any:
    del args, kwargs
    raise ValueError(
        "project_back closes a subspace and there is none here: use it in natgalore_jax.chain "
        "after low_rank_project or natural_galore"
    )


def init_back(
    settings: ProjectBack, treedef: Any, plans: Sequence[LeafPlan | None]
) -> ProjectBackState | optax.EmptyState:
    if not settings.residual:
        return optax.EmptyState()
    limited = settings.norm_growth_limit is not None
    norms = [
        jnp.zeros(plan.batch_shape, jnp.float32) if plan and limited else optax.MaskedNode()
        for plan in plans
    ]
    return ProjectBackState(jnp.zeros([], jnp.float32), treedef.unflatten(norms))


def update_back(
    settings: ProjectBack,
    state: ProjectBackState | optax.EmptyState,
    treedef: Any,
    plans: Sequence[LeafPlan | None],
    factors: Sequence[Factors],
    N: Sequence[jax.Array],
    R: Sequence[jax.Array],
    G: Sequence[jax.Array],
) -> tuple[list[jax.Array], ProjectBackState | optax.EmptyState]:
    """Full-shape updates from low-rank ones; every sequence has one entry per leaf.

    Args:
      N: what came out of the transformations inside the subspace.
      R: the low-rank gradient that went in.
      G: the full gradient.
    """
    if isinstance(state, optax.EmptyState):
        updates = [
            back(plan, settings.scale * n, factor).astype(n.dtype) if plan else n
            for plan, factor, n in zip(plans, factors, N, strict=True)
        ]
        return updates, state
    direction = _direction(state.direction, plans, N, R)
    norms = treedef.flatten_up_to(state.residual_norm)
    updates, new_norms = [], []
    for plan, factor, n, r, g, norm in zip(plans, factors, N, R, G, norms, strict=True):
        if plan:
            n, norm = _with_residual(settings, plan, factor, direction, n, r, g, norm)
        updates.append(n)
        new_norms.append(norm)
    return updates, ProjectBackState(direction, treedef.unflatten(new_norms))


def _direction(known, plans, N, R):
    """Whether N points along R or against it, decided once for all matrices together.

    Only at the first update is the answer certain: later, momentum may point anywhere.
    """
    along = sum(
        jnp.sum(n.astype(jnp.float32) * r.astype(jnp.float32))
        for plan, n, r in zip(plans, N, R, strict=True)
        if plan
    )
    return jnp.where((known == 0) & jnp.isfinite(along), jnp.sign(along), known)


def _with_residual(settings, plan: LeafPlan, factors: Factors, direction, N, R, G, last_norm):
    """``U = α P N + (G − P Pᵀ G) φ = P (α N − R φ) + G φ``: no product more than without residual.

    Because P is orthonormal, the residual's norm needs none either: column by column,
    ``‖g − P Pᵀ g‖² = ‖g‖² − ‖Pᵀ g‖²``.
    """
    nb, dtype = len(plan.batch), N.dtype
    N, R, G = (x.astype(jnp.float32) for x in (N, R, G))
    one_sided = len(plan.modes) == 2 and len(plan.projected_modes) == 1
    # φ has the batch axes and, if one side is projected, those of the other.
    if one_sided:
        (mode,) = plan.projected_modes
        kept = plan.modes[1 - mode]
        low_axes: tuple[int, ...] = (nb + plan.low_rank_axes[mode],)
    else:
        kept, low_axes = (), tuple(range(nb, R.ndim))
    owners = [*plan.batch, *kept]  # the axes of G that φ has, in the order of φ's
    full_axes = [a for a in range(G.ndim) if a not in owners]
    in_order = [sorted(owners).index(a) for a in owners]

    energy_N, energy_R = (jnp.sum(jnp.square(x), low_axes) for x in (N, R))
    energy_G = jnp.sum(jnp.square(G), full_axes).transpose(in_order)
    phi = jnp.sqrt(jnp.where(energy_R > 0, energy_N / jnp.where(energy_R > 0, energy_R, 1.0), 0.0))
    if settings.norm_growth_limit is not None:
        energy = jnp.square(phi) * jnp.maximum(energy_G - energy_R, 0.0)
        norm = jnp.sqrt(jnp.sum(energy, tuple(range(nb, energy.ndim))))
        # The first one is free.
        allowed = jnp.where(last_norm > 0, settings.norm_growth_limit * last_norm, jnp.inf)
        shrink = jnp.where(norm > allowed, allowed / jnp.where(norm > 0, norm, 1.0), 1.0)
        phi = phi * jnp.expand_dims(shrink, tuple(range(nb, phi.ndim)))
        last_norm = norm * shrink
    phi = phi * direction

    phi_low = jnp.expand_dims(phi, low_axes)
    phi_full = jnp.expand_dims(phi.transpose([owners.index(a) for a in sorted(owners)]), full_axes)
    U = back(plan, settings.scale * N - phi_low * R, factors) + phi_full * G
    return U.astype(dtype), last_norm
