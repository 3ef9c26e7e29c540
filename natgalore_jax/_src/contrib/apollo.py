"""APOLLO: gradients scaled by Adam's gain on a random projection."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.contrib.descent import descent
from natgalore_jax._src.kernels.factored_update import on_axes_of_gradient, phi_axes
from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.projection import project
from natgalore_jax._src.kernels.random import matrix_keys, normal, numbers_of
from natgalore_jax._src.kernels.residual import gain, limit_growth
from natgalore_jax._src.kernels.stacks import for_each, merged
from natgalore_jax._src.low_bits.adam import adam_in_float32
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import (
    check_adam,
    check_choice,
    check_growth_limit,
    check_integer,
    check_interval,
    check_number,
    check_seed,
)
from natgalore_jax._src.params.plan import LeafPlan, PlanSettings, plan_tree
from natgalore_jax._src.params.where import Where, hidden_matrices
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

GRANULARITIES = ("channel", "tensor")


class ScaleByApolloState(NamedTuple):
    """State of :func:`.scale_by_apollo`."""

    #: An optax.ScaleByAdamState. mu and nu are trees of parameters: batch + (rank, n) or (m, rank)
    #: where projected, else the parameter's shape; dtype of the parameter (mu: mu_dtype).
    adam: Any
    #: The tree of parameters: batch, float32, the norm of each matrix's last scaled gradient;
    #: MaskedNode where unprojected, or without a limit.
    update_norm: Any


def scale_by_apollo(
    rank: int = 128,
    update_interval: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    scale: float = 1.0,
    granularity: str = "channel",
    norm_growth_limit: float | None = 1.01,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale each channel of a gradient as Adam scales its random projection.

    For one matrix with gradient G, transposed if its columns are the shorter side,

    .. math::
      R = P G, \quad P_{ij} \sim \mathcal N(0, 1/r), \qquad N = \mathrm{Adam}(R), \qquad
      s_j = \lVert N_{:j} \rVert / \lVert R_{:j} \rVert, \qquad U = \alpha\, G \,\mathrm{diag}(s),

    or one :math:`s = \lVert N \rVert / \lVert R \rVert` for the whole matrix. A random projection
    preserves the norms of the n columns on average, and only norms are needed: there is no SVD, and
    the update has full rank. P (r, m) changes every T steps, the moments are kept. P is regenerated
    from its seed at every step, so that the state is the moments of R.

    Unprojected parameters take Adam's step, unscaled. R has the dtype of G; the norms are float32.

    Args:
      rank: r, clipped per matrix to its shorter side.
      update_interval: T, number of steps between changes of P.
      b1, b2, eps, mu_dtype: Adam's, as in ``optax.scale_by_adam``.
      scale: α, a number or a traced scalar.
      granularity: ``"channel"``, one s for each column (each row if the columns are the shorter
        side), or ``"tensor"``, one s for each matrix.
      norm_growth_limit: γ; limits the growth of the norm of a matrix's update per step. None: no
        limit. Put the learning rate after this transformation.
      where, axes: see :func:`.low_rank_project`.
      seed: of the projections. They depend on the number of the parameter in the tree too: do not
        add or freeze a parameter between two steps.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`.ScaleByApolloState`.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value; at ``init``
        as :func:`.low_rank_project`; at ``update`` for gradients of other shapes than at ``init``.

    References:
      Zhu et al., APOLLO: SGD-like memory, AdamW-level performance (2024), arXiv 2412.05270,
      algorithm 1.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> state = ng.contrib.scale_by_apollo(rank=2).init({"w": jnp.ones((6, 8)), "b": jnp.ones(8)})
      >>> state.adam.mu["w"].shape, state.adam.mu["b"].shape
      ((2, 8), (8,))
    """
    check_integer("rank", rank, minimum=1)
    check_interval("update_interval", update_interval)
    check_number("scale", scale, below=math.inf)
    check_choice("granularity", granularity, GRANULARITIES)
    check_growth_limit(norm_growth_limit)
    check_seed(seed)
    settings = PlanSettings(int(rank), where, axes)
    check_adam(b1, b2, eps, mu_dtype)
    adam = adam_in_float32(b1, b2, eps, mu_dtype=mu_dtype)

    @own_arithmetic
    def init_fn(params):
        # Any basis suffices: init needs only shapes, dtypes and shardings.
        plans, _, adam_state = init_low_rank(settings, adam, params)
        treedef = jax.tree.structure(params)
        norms = [
            # A sum of zeros has the sharding of later norms.
            jnp.sum(m.astype(jnp.float32), tuple(range(len(plan.batch), m.ndim)))
            if plan and norm_growth_limit is not None
            else optax.MaskedNode()
            for plan, m in zip(plans, treedef.flatten_up_to(adam_state.mu), strict=True)
        ]
        return ScaleByApolloState(adam_state, treedef.unflatten(norms))

    @own_arithmetic
    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        plans = plan_tree(settings, updates)
        G, treedef = jax.tree.flatten(updates)
        check_type(state, ScaleByApolloState, "optimizer")
        check_moments(updates, plans, state.adam.mu, mu_dtype, "rank, where or mu_dtype")
        has_limit = norm_growth_limit is not None
        norms = [Form(p.batch_shape) if p and has_limit else None for p in plans]
        check_stored(updates, norms, state.update_norm, "update_norm", "norm_growth_limit")
        check_params(updates, params)
        last_norms = treedef.flatten_up_to(state.update_norm)
        window = state.adam.count // update_interval
        found = for_each(
            _projected,
            [plan and (plan.unnamed, int(seed)) for plan in plans],
            (G, numbers_of(plans)),
            window,
        )
        (R,) = merged(found, G)
        N, adam_state = adam.update(treedef.unflatten(R), state.adam)

        out = treedef.flatten_up_to(N)
        found = for_each(
            _scaled,
            [plan and (plan.unnamed, granularity) for plan in plans],
            (G, R, out, last_norms),
            (scale, norm_growth_limit),
        )
        out, norms = map(treedef.unflatten, merged(found, out, last_norms))
        out = with_update_dtypes(out, updates, params)
        return out, ScaleByApolloState(with_dtypes_of(state.adam, adam_state), norms)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _projected(settings, operands, window):
    """Low-rank gradient of one parameter, in a tuple."""
    (plan, seed), (G, (leaf, first)) = settings, operands
    return (project(plan, G, (random_projection(plan, seed, window, leaf, G.dtype, first),)),)


def _scaled(settings, operands, shared):
    """Update of one parameter, and its norm."""
    (plan, granularity), (G, R, N, last_norm) = settings, operands
    scale, limit = shared
    U = scaling(plan, R, N, granularity) * G.astype(jnp.float32)
    if limit is not None:
        U, last_norm = limit_growth(plan.batch, U, last_norm, limit)
    return (scale * U).astype(N.dtype), last_norm


def random_projection(
    plan: LeafPlan,
    seed: int,
    window: jax.typing.ArrayLike,
    leaf: jax.typing.ArrayLike,
    dtype: Any,
    first: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """``Pᵀ`` with entries from N(0, 1/r), determined by seed, window and leaf.

    Args:
      plan: of a matrix with one projected side.
      seed: of the run.
      window: number of the interval of steps.
      leaf: number of the parameter.
      dtype: of the result, which is sampled in float32.
      first: number of the first matrix of the parameter.

    Returns:
      Shape ``plan.factor_shape`` of the projected mode, different for each matrix of a batch.
    """
    (mode,) = plan.projected_modes
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), window), leaf)
    shape = (*plan.mode_shape(mode), plan.rank_of(mode))
    if plan.batch:
        P = jax.vmap(lambda key: normal(key, shape))(matrix_keys(plan, key, first))
    else:
        P = normal(key, shape)
    return (P.reshape(plan.factor_shape(mode)) / math.sqrt(plan.rank_of(mode))).astype(dtype)


def scaling(plan: LeafPlan, R: jax.Array, N: jax.Array, granularity: str) -> jax.Array:
    """``s = ‖N‖ / ‖R‖`` by channel or by matrix, and 0 where R is 0.

    Args:
      plan: of a matrix with one projected side.
      R, N: shape ``plan.low_rank_shape``: the projected gradient, and Adam's update.
      granularity: one of ``GRANULARITIES``.

    Returns:
      float32, with as many axes as the parameter, for broadcasting.
    """
    axes = phi_axes(plan, by_channel=granularity == "channel")
    energy_N, energy_R = (jnp.sum(jnp.square(x.astype(jnp.float32)), axes.low) for x in (N, R))
    return on_axes_of_gradient(axes, gain(energy_N, energy_R))


def apollo_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_interval: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    scale: float = 1.0,
    granularity: str = "channel",
    norm_growth_limit: float | None = 1.01,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO: full-rank steps with AdamW's scale for each channel of the gradient.

    .. math::
      W \leftarrow W - \eta\,(\alpha\, G \,\mathrm{diag}(s) + \omega W)

    with s from Adam on a random projection of G, see :func:`.scale_by_apollo`. The state is the
    moments of an r × n projection without a basis, less than GaLore's at the same rank. Unprojected
    parameters take plain AdamW steps with the same learning rate.

    It is this composition::

      optax.chain(
          ng.contrib.scale_by_apollo(
              rank=rank, update_interval=update_interval, b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype,
              scale=scale, granularity=granularity, norm_growth_limit=norm_growth_limit,
              where=where, axes=axes, seed=seed),
          optax.add_decayed_weights(weight_decay, mask),
          optax.scale_by_learning_rate(learning_rate),
      )

    Args:
      learning_rate: η, a number or a schedule. The paper pre-trains with 0.01.
      rank: r, a quarter of the width in the paper.
      update_interval, b1, b2, eps, mu_dtype, granularity, norm_growth_limit, where, axes, seed:
        see :func:`.scale_by_apollo`.
      weight_decay: ω, decoupled; acts on the whole weight, unscaled by α.
      mask: which parameters decay, as in ``optax.adamw``.
      scale: α, 1 in the paper. At a rank far below the shorter side m the norms of N are too small
        by about √(r / m): compensate with a larger α.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as :func:`.scale_by_apollo`.

    References:
      Zhu et al., APOLLO: SGD-like memory, AdamW-level performance (2024), arXiv 2412.05270,
      algorithm 1. Adam and weight decay here are as in ``optax.adamw``.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> state = ng.contrib.apollo_adamw(1e-2, rank=2).init({"w": jnp.ones((6, 8))})
      >>> state[0].adam.mu["w"].shape, state[0].update_norm["w"].shape
      ((2, 8), ())
    """
    return descent(
        scale_by_apollo(
            rank=rank,
            update_interval=update_interval,
            b1=b1,
            b2=b2,
            eps=eps,
            mu_dtype=mu_dtype,
            scale=scale,
            granularity=granularity,
            norm_growth_limit=norm_growth_limit,
            where=where,
            axes=axes,
            seed=seed,
        ),
        learning_rate,
        weight_decay,
        mask,
    )


def apollo_mini_adamw(
    learning_rate: optax.ScalarOrSchedule,
    update_interval: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    scale: float = math.sqrt(128),
    norm_growth_limit: float | None = 1.01,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO-Mini: :func:`.apollo_adamw` at rank 1 with one scale per matrix.

    The state of a projected m × n matrix is two vectors along its longer side and a norm.

    It is this composition::

      ng.contrib.apollo_adamw(
          learning_rate, rank=1, update_interval=update_interval, b1=b1, b2=b2, eps=eps,
          mu_dtype=mu_dtype, weight_decay=weight_decay, mask=mask, scale=scale,
          granularity="tensor", norm_growth_limit=norm_growth_limit, where=where, axes=axes,
          seed=seed,
      )

    Args:
      learning_rate, update_interval, b1, b2, eps, mu_dtype, weight_decay, mask, norm_growth_limit,
        where, axes, seed: see :func:`.apollo_adamw`. The paper pre-trains with a learning rate of
        0.01 or 0.02.
      scale: α. The paper's √128 compensates for the small norms at rank 1.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as :func:`.scale_by_apollo`.

    References:
      Zhu et al., APOLLO: SGD-like memory, AdamW-level performance (2024), arXiv 2412.05270.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> state = ng.contrib.apollo_mini_adamw(1e-2).init({"w": jnp.ones((6, 8))})
      >>> state[0].adam.mu["w"].shape, state[0].update_norm["w"].shape
      ((1, 8), ())
    """
    return apollo_adamw(
        learning_rate,
        rank=1,
        update_interval=update_interval,
        b1=b1,
        b2=b2,
        eps=eps,
        mu_dtype=mu_dtype,
        weight_decay=weight_decay,
        mask=mask,
        scale=scale,
        granularity="tensor",
        norm_growth_limit=norm_growth_limit,
        where=where,
        axes=axes,
        seed=seed,
    )
