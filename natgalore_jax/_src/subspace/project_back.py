"""Projection of updates back to full shape, with or without a residual."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.factored_update import FactoredUpdate, whole
from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.projection import Factors
from natgalore_jax._src.kernels.residual import (
    RULES,
    Residual,
    Rule,
    empty_fisher,
    fisher_shape,
    with_residual,
)
from natgalore_jax._src.kernels.spectral import clip_each, clip_leading, clip_leading_of_factored
from natgalore_jax._src.kernels.stacks import for_each, for_each_gradient, merged
from natgalore_jax._src.params.checks import (
    check_choice,
    check_decay,
    check_growth_limit,
    check_integer,
    check_number,
    check_unused,
)
from natgalore_jax._src.params.placement import zeros_on_axes
from natgalore_jax._src.params.plan import LeafPlan, PlanSettings, plan_tree
from natgalore_jax._src.states.entries import Part, StateType, register_type
from natgalore_jax._src.states.tree_checks import Form, check_form, check_type, form_of
from natgalore_jax._src.subspace.project import only_in_chain

NORM_GROWTH_LIMIT, RESIDUAL_DECAY = 1.01, 0.9


class ProjectBackState(NamedTuple):
    """State of :func:`project_back` with a residual."""

    #: The tree of parameters: batch, float32: +1 if the inner updates of a matrix point along its
    #: gradient, −1 if they already descend, 0 until the first non-zero update; MaskedNode where
    #: unprojected. One per matrix: a shared sign would depend on the gradients of all parameters.
    direction: Any
    #: The tree of parameters: batch, float32, the norm of each matrix's last residual update;
    #: MaskedNode where unprojected, without a limit, or if the residual is not "fira".
    residual_norm: Any
    #: The tree of parameters: batch + the unprojected side, float32, the average of the mean square
    #: of each column (row) of the residual; MaskedNode where unprojected, or if the residual is not
    #: "fisher".
    residual_fisher: Any


class _ResidualMemory(StateType):
    def parts(self, state):
        per_matrix = (state.direction, state.residual_norm)
        return [
            Part("other", per_matrix, lambda plan: 1),
            Part("other", state.residual_fisher, lambda plan: math.prod(fisher_shape(plan))),
        ]


register_type(ProjectBackState, _ResidualMemory())


class ProjectBack(optax.GradientTransformationExtraArgs):
    """Result of :func:`project_back`: closes a subspace in :func:`natgalore_jax.chain`."""

    scale: float
    residual: Residual | None
    singular_limit: float | None
    singular_values: int


def project_back(
    scale: float = 1.0,
    residual: Rule = "none",
    norm_growth_limit: float | None = NORM_GROWTH_LIMIT,
    residual_scale: float | None = None,
    residual_decay: float | None = None,
    singular_limit: float | None = None,
    singular_values: int = 1,
) -> ProjectBack:
    r"""Project low-rank updates back to the shapes of the parameters.

    .. math:: U = \alpha P N, \qquad \alpha N Q^\top, \qquad\text{or}\qquad \alpha P N Q^\top,

    where N is the update of the transformations inside the subspace. ``residual`` adds the part of
    the gradient outside the subspace, :math:`E = G - P P^\top G`:

    .. math:: U = \alpha P N + \sigma\,E\,\mathrm{diag}(\varphi),

    with φ per column if the rows are projected, per row if the columns are projected, and one
    number for the whole matrix if both sides are projected, or for Tucker. ``"fira"`` is Fira's
    rule, the gain of the inner optimizer on the projected part of the column:

    .. math:: \varphi_j = \lVert N_{:j} \rVert / \lVert R_{:j} \rVert .

    ``"fisher"`` is a natural gradient outside the subspace. It approximates the Fisher matrix of E
    by one number per column, :math:`c_j = \mathrm{EMA}_\beta(\tfrac1m \sum_i E_{ij}^2)`, an average
    that starts at its first value, and multiplies the residual by the inverse root:

    .. math:: \varphi_j = 1 / \sqrt{c_j + \delta\,\tfrac1m \sum_i G_{ij}^2},
       \qquad \delta = 10^{-4},

    where δ, 0.0046 for gradients in bfloat16 and 0.0007 in float16, bounds the amplification of
    rounding errors in columns with so small a share outside the subspace. The entries of the
    residual update have a root mean square of about σ. α does not act on
    the residual, and "fisher" does not follow the size of the inner updates: put the learning rate
    after ``project_back``. If the inner updates already descend (a learning rate inside the
    subspace, as in ``optax.adamw``), the residual takes their sign, which is determined at the
    first non-zero update, and of "fisher" the size σ.

    Args:
      scale: α, a number or a traced scalar. GaLore uses 0.25 with a learning rate of 0.01.
      residual: ``"none"``, ``"fira"`` or ``"fisher"``. "fira" needs no memory, "fisher" one number
        for each column; neither needs an additional product.
      norm_growth_limit: γ, the limit on spikes, or None for no limit. The norm of a matrix's
        residual update is at most γ times its level. For "fisher" the level is σ √(m n), without
        memory: after a vanishing gradient the next update has its full size. A spike enters c as at
        most ten times c, and does not shrink later updates. For "fira" the level is the norm at the
        last step, as published: after a small update the norm grows by a factor of γ a step. Put
        the learning rate after ``project_back``, or its warm-up is limited as well.
      residual_scale: σ, a number or a traced scalar. None: 1 for "fira", as published, and 0.4 for
        "fisher", twice the root mean square of AdamW's updates (0.6 had the same loss at α = 1).
      residual_decay: β of "fisher"; None: 0.9, with which c follows the size of the gradient within
        ten steps.
      singular_limit: c, a number or a traced scalar: the leading singular values of the update of
        each matrix that the ``where`` of the subspace selects, projected or too small for it, are
        clipped to :math:`c \sqrt{\max(m, n)}`, as by :func:`clip_leading_singular_value` after the
        subspace, but in less time: where one side is projected, the power iteration starts from
        the low-rank update and gradient, and reads the gradient twice with a residual, without one
        not at all. None: no limit.
      singular_values: how many singular values ``singular_limit`` is for, as in
        :func:`clip_leading_singular_value`.

    Returns:
      A transformation for :func:`natgalore_jax.chain`; its state is empty without a residual.

    Raises:
      TypeError, ValueError: for an argument of a wrong type or value, as ``norm_growth_limit`` ≤ 1,
        and for arguments without an effect: arguments of the residual with ``residual="none"``,
        ``residual_decay`` with "fira", ``singular_values`` without ``singular_limit``.

    References:
      Zhao et al., GaLore (2024), "Adam with GaLore" in appendix B, for α; Chen et al., Fira (2024),
      arXiv 2410.01623, for "fira" (norm-based scaling) and the limit (norm-growth limiter); Gong
      et al., Towards efficient optimizer design for LLM via structured Fisher approximation (2025),
      for the Fisher matrix of the residual of a low-rank approximation.

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> tx = ng.chain(ng.low_rank_project(rank=2), ng.project_back(scale=0.5, residual="fira"))
      >>> grads = {"w": jnp.arange(20.0).reshape(4, 5) ** 2}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].shape
      (4, 5)
    """
    check_number("scale", scale)
    check_choice("residual", residual, Rule)
    check_growth_limit(norm_growth_limit)
    if residual_scale is not None:
        check_number("residual_scale", residual_scale)
    if residual_decay is not None:
        check_decay("residual_decay", residual_decay)
    if singular_limit is not None:
        check_number("singular_limit", singular_limit, above=0.0)
    else:
        check_unused("singular_values", singular_values, 1, "without singular_limit")
    check_integer("singular_values", singular_values, minimum=1)
    if residual == "none":
        if norm_growth_limit is not None:
            check_unused(
                "norm_growth_limit", norm_growth_limit, NORM_GROWTH_LIMIT, "without a residual"
            )
        check_unused("residual_scale", residual_scale, None, "without a residual")
    if residual == "none" or not RULES[residual].has_memory:
        check_unused("residual_decay", residual_decay, None, 'without residual="fisher"')
    tx = ProjectBack(
        *only_in_chain(
            "project_back closes a subspace and there is none here: use it in natgalore_jax.chain "
            "after low_rank_project or natural_galore, itself and not inside another "
            "transformation such as optax.inject_hyperparams"
        )
    )
    tx.scale, tx.residual = scale, None
    tx.singular_limit, tx.singular_values = singular_limit, singular_values
    if residual != "none":
        sigma = RULES[residual].scale if residual_scale is None else residual_scale
        decay = RESIDUAL_DECAY if residual_decay is None else residual_decay
        tx.residual = Residual(residual, sigma, decay, norm_growth_limit)
    return tx


@own_arithmetic
def init_back(
    settings: ProjectBack, treedef: Any, plans: Sequence[LeafPlan | None], low_rank: Sequence[Any]
) -> ProjectBackState | optax.EmptyState:
    """Initial state for parameters with the low-rank leaves ``low_rank``."""
    if settings.residual is None:
        return optax.EmptyState()

    def tree(start, is_kept=True):
        return treedef.unflatten(
            start(plan, leaf) if plan and is_kept else optax.MaskedNode()
            for plan, leaf in zip(plans, low_rank, strict=True)
        )

    def per_matrix(plan, leaf):
        return zeros_on_axes(leaf, len(plan.batch), jnp.float32)

    return ProjectBackState(
        tree(per_matrix),
        tree(per_matrix, settings.residual.keeps_norm),
        tree(empty_fisher, RULES[settings.residual.rule].has_memory),
    )


def clipped_matrices(
    settings: ProjectBack, of_subspace: PlanSettings, tree: Any
) -> list[LeafPlan | None]:
    """Plans by rows and columns alone of the leaves that ``singular_limit`` is for."""
    if settings.singular_limit is None:
        return [None] * len(jax.tree.leaves(tree))
    return plan_tree(dataclasses.replace(of_subspace, rank=None), tree)


def update_back(
    settings: ProjectBack,
    state: ProjectBackState | optax.EmptyState,
    treedef: Any,
    plans: Sequence[LeafPlan | None],
    matrices: Sequence[LeafPlan | None],
    factors: Sequence[Factors],
    N: Sequence[jax.Array],
    R: Sequence[jax.Array],
    G: Sequence[jax.Array],
    basis_error: float = 0.0,
) -> tuple[list[jax.Array], ProjectBackState | optax.EmptyState]:
    """Full-shape updates from low-rank updates; every sequence has one entry per leaf.

    Args:
      matrices: of :func:`clipped_matrices`.
      N: the updates of the transformations inside the subspace.
      R: the low-rank gradients.
      G: the full gradients; without a residual anything of their shapes and shardings.
      basis_error: relative mean square of the rounding errors of the stored bases.
    """
    residual = settings.residual
    has_state = residual is not None
    if has_state or isinstance(state, ProjectBackState):
        check_type(state, ProjectBackState if has_state else optax.EmptyState, "residual")
    states = [None] * len(plans)
    if has_state:
        states = list(zip(*map(treedef.flatten_up_to, state), strict=True))
        for plan, own in zip(plans, states, strict=True):
            if plan:
                _check_memory(residual, plan, own)
    rule, *numbers = settings.residual or (None,)
    own = [tuple(x and x.unnamed for x in pair) for pair in zip(plans, matrices, strict=True)]
    found = for_each_gradient(
        _factored,
        _whole,
        [(*pair, rule, basis_error, settings.singular_values) if pair[0] else None for pair in own],
        (factors, states, N, R),
        G,
        (numbers, settings.scale, settings.singular_limit),
    )
    updates, states = merged(found, N, states)
    found = for_each(
        clip_each,
        [
            (matrix, settings.singular_values) if matrix and not plan else None
            for plan, matrix in own
        ],
        (updates,),
        settings.singular_limit,
    )
    (updates,) = merged(found, updates)
    if not has_state:
        return updates, state
    fields = zip(*states, strict=True) if states else ((), (), ())
    return updates, ProjectBackState(*map(treedef.unflatten, fields))


def _check_memory(residual: Residual, plan: LeafPlan, memory: Sequence[Any]) -> None:
    """Check the entries of one parameter in the fields of a :class:`ProjectBackState`."""
    of_matrices = Form(plan.batch_shape)
    expected = (
        of_matrices,
        of_matrices if residual.keeps_norm else None,
        Form(fisher_shape(plan)) if RULES[residual.rule].has_memory else None,
    )
    for name, form, entry in zip(ProjectBackState._fields, expected, memory, strict=True):
        check_form(
            plan.path, plan.shape, form, form_of(entry), name, "residual or norm_growth_limit"
        )


def _factored(settings, operands, G, shared):
    """The update of one parameter in factors; its direction, norm and Fisher entries."""
    plan, _, rule, basis_error, count = settings
    factors, state, N, R = operands
    numbers, scale, limit = shared
    if rule is None:
        update = FactoredUpdate(scale * N)
    else:
        direction, norm, fisher = state
        direction = _direction(direction, N, R)
        update, norm, fisher = with_residual(
            Residual(rule, *numbers),
            plan,
            scale,
            direction,
            *(N, R, G),
            last_norm=norm,
            fisher=fisher,
            basis_error=basis_error,
        )
        state = direction, norm, fisher
    if limit is not None and plan.is_one_sided:
        update = clip_leading_of_factored(plan, factors, update, scale * N, G, limit, count)
    return update, state


def _whole(settings, operands, found, G, shared):
    """The update of one parameter in full shape, in the dtype of N, and its entries."""
    plan, matrix, _, _, count = settings
    factors, _, N, _ = operands
    update, state = found
    _, _, limit = shared
    U = whole(plan, factors, update, G)
    if limit is not None and matrix is not None and not plan.is_one_sided:
        U = clip_leading(matrix, U, limit, count)
    return U.astype(N.dtype), state


def _direction(last: jax.Array, N: jax.Array, R: jax.Array) -> jax.Array:
    """Sign of ⟨N, R⟩, decided once for each matrix.

    Only the first update determines it, because later momentum may point anywhere.
    """
    products = N.astype(jnp.float32) * R.astype(jnp.float32)
    along = jnp.sum(products, tuple(range(last.ndim, R.ndim)))
    return jnp.where((last == 0) & jnp.isfinite(along), jnp.sign(along), last)
