"""LDAdam: Adam in a subspace that changes at every step, with transported moments."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.contrib.descent import descent
from natgalore_jax._src.contrib.ldadam_kernels import (
    next_basis,
    overlap,
    rotated_moments,
    scaled_down,
)
from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.projection import project, project_back
from natgalore_jax._src.kernels.stacks import for_each, merged
from natgalore_jax._src.low_bits.adam import adam_in_float32
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import check_adam, check_boolean, check_decay, check_integer
from natgalore_jax._src.params.plan import PlanSettings, plan_tree
from natgalore_jax._src.params.where import Where, hidden_matrices
from natgalore_jax._src.states.entries import OwnBasis, register_type
from natgalore_jax._src.states.tree_checks import (
    Form,
    check_moments,
    check_params,
    check_stored,
    check_type,
    with_dtypes_of,
    with_update_dtypes,
)
from natgalore_jax._src.subspace.subspace import init_low_rank


class ScaleByLDAdamState(NamedTuple):
    """State of :func:`.scale_by_ldadam`."""

    #: An optax.ScaleByAdamState. mu and nu are trees of parameters: batch + (rank, n) or (m, rank)
    #: where projected, else the parameter's shape; dtype of the parameter (mu: mu_dtype).
    adam: Any
    #: The tree of parameters: batch + the axes of the shorter side + (rank,), dtype of the
    #: parameter; MaskedNode where unprojected.
    basis: Any
    #: The tree of parameters: shape and dtype of the parameter; MaskedNode where unprojected, or
    #: without error feedback.
    error: Any


register_type(ScaleByLDAdamState, OwnBasis())


def scale_by_ldadam(
    rank: int = 128,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    rho: float = 0.908,
    error_feedback: bool = False,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in a low-rank subspace that follows gradient and momentum at every step.

    For one matrix with gradient G, transposed if its columns are the shorter side, with
    :math:`A = G` (:math:`A = G + E` with error feedback), hats for Adam's bias correction and
    squares by element,

    .. math::
      \begin{align*}
      B &= \rho\, P \hat M + (1 - \rho) A, \qquad P' = \mathrm{orth}(B B^\top P), \qquad
        C = P'^\top P \\
      \tilde M &= C M, \qquad
      \tilde V = (1 - \beta_2^{t-1})\,
        \bigl| C^2 (\hat V - \hat M^2) + (C \hat M)^2 \bigr| \\
      N &= \mathrm{Adam}(P'^\top A;\, \tilde M, \tilde V), \qquad U = P' N \\
      E &= A - P' P'^\top A + \tfrac{\beta_1}{1 - \beta_1} (P M - P' \tilde M)
      \end{align*}

    One power step suffices because most of B lies in the old subspace; orth orthonormalises columns
    by matrix products, in the order of their size. The rule for V rotates the variances and the
    squared means of the projected gradient separately. Unprojected parameters take Adam's step.
    A with an entry beyond 1e15 is scaled down to 1e15, so that no square overflows.

    Args:
      rank: r, clipped per matrix to its shorter side.
      b1, b2, eps, mu_dtype: Adam's, as in ``optax.scale_by_adam``.
      rho: ρ, weight of the momentum in B, which does not change with ``b1``; with 0 the basis
        follows the newest gradient alone.
      error_feedback: add the accumulated projection error E to each gradient. E has the size of the
        parameter, half of AdamW's state, in addition to basis and moments.
      where, axes: see :func:`.low_rank_project`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`.ScaleByLDAdamState`.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value; at ``init``
        as :func:`.low_rank_project`; at ``update`` for gradients of other shapes than at ``init``.
        A zero or non-finite B is not an error and leaves the basis unchanged.

    References:
      Robert et al., LDAdam: adaptive optimization from low-dimensional gradient statistics (2024),
      arXiv 2410.16103. The paper computes the first basis by an SVD, here by eight power steps; its
      orth is a QR factorisation; its error feedback is not optional.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> state = ng.contrib.scale_by_ldadam(rank=2).init({"w": jnp.ones((6, 8)), "b": jnp.ones(8)})
      >>> state.basis["w"].shape, state.adam.mu["w"].shape, state.adam.mu["b"].shape
      ((6, 2), (2, 8), (8,))
    """
    check_integer("rank", rank, minimum=1)
    check_decay("rho", rho)
    check_boolean("error_feedback", error_feedback)
    settings = PlanSettings(int(rank), where, axes)
    check_adam(b1, b2, eps, mu_dtype)
    adam = adam_in_float32(b1, b2, eps, mu_dtype=mu_dtype)

    @own_arithmetic
    def init_fn(params):
        plans, factors, adam_state = init_low_rank(settings, adam, params)
        leaves, treedef = jax.tree.flatten(params)
        return ScaleByLDAdamState(
            adam_state,
            treedef.unflatten(factor[0] if factor else optax.MaskedNode() for factor in factors),
            treedef.unflatten(
                jnp.zeros_like(leaf) if plan and error_feedback else optax.MaskedNode()
                for plan, leaf in zip(plans, leaves, strict=True)
            ),
        )

    @own_arithmetic
    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        plans = plan_tree(settings, updates)
        G, treedef = jax.tree.flatten(updates)
        check_type(state, ScaleByLDAdamState, "optimizer")
        check_moments(updates, plans, state.adam.mu, mu_dtype, "rank, where or mu_dtype")
        shapes = [Form(p.shape) if p and error_feedback else None for p in plans]
        check_stored(updates, shapes, state.error, "error", "error_feedback")
        check_params(updates, params)
        errors = treedef.flatten_up_to(state.error)
        bases, M, V = (
            treedef.flatten_up_to(x) for x in (state.basis, state.adam.mu, state.adam.nu)
        )
        count = state.adam.count

        nothing = [None] * len(plans)
        own_plans = [plan and plan.unnamed for plan in plans]
        found = for_each(
            _refreshed,
            own_plans,
            (G, errors if error_feedback else nothing, bases, M, V),
            (b1, b2, rho, count),
        )
        R, new_bases, M_rotated, V_rotated, A = merged(found, G, bases, M, V, nothing)
        N, adam_state = adam.update(
            treedef.unflatten(R),
            state.adam._replace(mu=treedef.unflatten(M_rotated), nu=treedef.unflatten(V_rotated)),
        )
        out = treedef.flatten_up_to(N)
        fed_back = [*zip(A, R, M, bases, M_rotated, errors, strict=True)]
        found = for_each(
            _back,
            own_plans,
            (out, new_bases, fed_back if error_feedback else nothing),
            b1,
        )
        out, errors = merged(found, out, errors)
        out = with_update_dtypes(treedef.unflatten(out), updates, params)
        return out, ScaleByLDAdamState(
            with_dtypes_of(state.adam, adam_state),
            treedef.unflatten(new_bases),
            treedef.unflatten(errors),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _refreshed(plan, operands, shared):
    """Low-rank gradient of one parameter in its new basis, the basis, rotated moments, and A.

    A only with error feedback.
    """
    G, E, P, M, V = operands
    b1, b2, rho, count = shared
    A = scaled_down(plan, G if E is None else G + E)
    P_new = next_basis(plan, A, P, M, count, b1, rho)
    C = overlap(plan, P_new, P)
    R, moments = project(plan, A, (P_new,)), rotated_moments(plan, C, M, V, count, b1, b2)
    return R, P_new, *moments, None if E is None else A


def _back(plan, operands, b1):
    """Update of one parameter, and its error feedback in the dtype of the last one.

    The error is gradient and momentum minus their projections.
    """
    N, P_new, fed_back = operands
    update, error = project_back(plan, N, (P_new,)), optax.MaskedNode()
    if fed_back is not None:
        A, R, M, P, M_rotated, last = fed_back
        past = b1 / (1 - b1)
        kept = project_back(plan, R + past * M_rotated, (P_new,))
        error = (A + past * project_back(plan, M, (P,)) - kept).astype(last.dtype)
    return update, error


def ldadamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    rho: float = 0.908,
    error_feedback: bool = False,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LDAdam with decoupled weight decay: ``W ← W − η (U + ω W)``, U of :func:`.scale_by_ldadam`.

    It is this composition::

      optax.chain(
          ng.contrib.scale_by_ldadam(
              rank=rank, b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype, rho=rho,
              error_feedback=error_feedback, where=where, axes=axes),
          optax.add_decayed_weights(weight_decay, mask),
          optax.scale_by_learning_rate(learning_rate),
      )

    Args:
      learning_rate: η, a number or a schedule.
      rank, b1, b2, eps, mu_dtype, rho, error_feedback, where, axes: see :func:`.scale_by_ldadam`.
      weight_decay: ω, decoupled; acts on the whole weight.
      mask: which parameters decay, as in ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as :func:`.scale_by_ldadam`.

    References:
      Robert et al., LDAdam (2024), arXiv 2410.16103; :func:`.scale_by_ldadam` has the differences.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tx = ng.contrib.ldadamw(1e-3, rank=2, error_feedback=True)
      >>> state = tx.init({"w": jnp.ones((6, 8))})
      >>> state[0].adam.mu["w"].shape, state[0].error["w"].shape
      ((2, 8), (6, 8))
    """
    return descent(
        scale_by_ldadam(
            rank=rank,
            b1=b1,
            b2=b2,
            eps=eps,
            mu_dtype=mu_dtype,
            rho=rho,
            error_feedback=error_feedback,
            where=where,
            axes=axes,
        ),
        learning_rate,
        weight_decay,
        mask,
    )
