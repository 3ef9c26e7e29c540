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
      residual: whether to add the residual. It needs no memory but costs two more products.
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
    scaled = [
        back(plan, settings.scale * n, factor).astype(n.dtype) if plan else n
        for plan, factor, n in zip(plans, factors, N, strict=True)
    ]
    if isinstance(state, optax.EmptyState):
        return scaled, state
    direction = _direction(state.direction, plans, N, R)
    norms = treedef.flatten_up_to(state.residual_norm)
    updates, new_norms = [], []
    for plan, factor, u, n, r, g, norm in zip(plans, factors, scaled, N, R, G, norms, strict=True):
        if plan:
            S = _residual(plan, factor, n, r, g) * direction
            if settings.norm_growth_limit is not None:
                S, norm = _limit_growth(plan, S, norm, settings.norm_growth_limit)
            u = u + S.astype(u.dtype)
        updates.append(u)
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


def _residual(plan: LeafPlan, factors: Factors, N, R, G) -> jax.Array:
    """``(G − P Pᵀ G) φ`` in float32, the shape of the parameter."""
    nb = len(plan.batch)
    one_sided = len(plan.modes) == 2 and len(plan.projected_modes) == 1
    if one_sided:
        (mode,) = plan.projected_modes
        norm_axes: tuple[int, ...] = (nb + plan.low_rank_axes[mode],)
    else:
        norm_axes = tuple(range(nb, R.ndim))
    size_N, size_R = (
        jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), norm_axes)) for x in (N, R)
    )
    phi = jnp.where(size_R > 0, size_N / jnp.where(size_R > 0, size_R, 1.0), 0.0)
    # φ has the batch axes and, if one-sided, those of the mode that is kept; back to their places.
    axes = [*plan.batch, *(plan.modes[1 - plan.projected_modes[0]] if one_sided else ())]
    phi = phi.transpose([axes.index(a) for a in sorted(axes)])
    phi = jnp.expand_dims(phi, [a for a in range(G.ndim) if a not in axes])
    G32 = G.astype(jnp.float32)
    return (G32 - back(plan, R.astype(jnp.float32), factors)) * phi


def _limit_growth(plan: LeafPlan, S, last_norm, limit):
    """Shrinks S where its norm exceeds ``limit`` times the last one; the first is free."""
    axes = [a for a in range(S.ndim) if a not in plan.batch]
    norm = jnp.sqrt(jnp.sum(jnp.square(S), axes))
    allowed = jnp.where(last_norm > 0, limit * last_norm, jnp.inf)
    factor = jnp.where(norm > allowed, allowed / jnp.where(norm > 0, norm, 1.0), 1.0)
    return S * jnp.expand_dims(factor, axes), norm * factor
