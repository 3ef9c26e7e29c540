"""RACS: SGD whose gradients are scaled by row and by column."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.contrib.descent import descent
from natgalore_jax._src.kernels.factored_update import (
    on_axes_of_gradient,
    side_axes,
    sum_for_phi,
)
from natgalore_jax._src.kernels.kernel import kernel, own_arithmetic
from natgalore_jax._src.kernels.residual import inverse_root, limit_growth
from natgalore_jax._src.kernels.stacks import for_each, merged
from natgalore_jax._src.low_bits.adam import adam_in_float32
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import (
    check_adam,
    check_decay,
    check_growth_limit,
    check_integer,
    check_number,
)
from natgalore_jax._src.params.context import current_subspace
from natgalore_jax._src.params.plan import (
    LeafPlan,
    PlanSettings,
    plan_tree,
    require_matrices,
    without_matrices,
)
from natgalore_jax._src.params.where import Where, hidden_matrices
from natgalore_jax._src.states.tree_checks import (
    Form,
    check_params,
    check_stored,
    check_type,
    form_in,
    with_dtypes_of,
    with_update_dtypes,
)


class ScaleByRacsState(NamedTuple):
    """State of :func:`.scale_by_racs`."""

    #: An optax.ScaleByAdamState of the parameters that are not scaled by row and column: mu and nu
    #: are trees of parameters, shape and dtype of the parameter (mu: mu_dtype), or MaskedNode.
    adam: Any
    #: q of the rows. The tree of parameters: batch + the axes of the rows, float32, in the unit of
    #: the gradient squared if the rows are the longer side, else without unit; or MaskedNode.
    rows: Any
    #: s of the columns. The tree of parameters: batch + the axes of the columns, float32, with the
    #: unit if the rows are not the longer side; or MaskedNode.
    columns: Any
    #: The tree of parameters: batch, float32, the norm of each matrix's last scaled gradient;
    #: MaskedNode without a limit.
    update_norm: Any


def scale_by_racs(
    decay: float = 0.9,
    iterations: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    scale: float = 0.05,
    norm_growth_limit: float | None = 1.01,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the rows and the columns of a gradient by an approximation of its Fisher matrix.

    For one matrix with gradient G, transposed if its columns are the shorter side,
    :math:`G^{\odot 2}` by element, iterate from :math:`q = 1`

    .. math::
      s \leftarrow (G^{\odot 2})^\top q \,/\, \lVert q \rVert^2, \qquad
      q \leftarrow G^{\odot 2} s \,/\, \lVert s \rVert^2,

    a power iteration for the leading singular vectors of :math:`G^{\odot 2}`:
    :math:`\mathrm{diag}(s) \otimes \mathrm{diag}(q)` is the Kronecker product of diagonal matrices
    nearest to the Fisher matrix of one gradient. Both are averaged over the steps, and

    .. math::
      \begin{align*}
      \bar s &\leftarrow \beta \bar s + (1 - \beta) s, \qquad
      \bar q \leftarrow \beta \bar q + (1 - \beta) q, \qquad
      \tilde G = \mathrm{diag}(\bar q)^{-1/2}\, G \,\mathrm{diag}(\bar s)^{-1/2}, \\
      U &= \alpha \tilde G \cdot \min(1, \gamma \varphi / \lVert \tilde G \rVert)
      \end{align*}

    with φ the norm of the last :math:`\tilde G` after its limit. The averages start at zero without
    a bias correction, as in the paper: the first steps are up to :math:`1 / (1 - \beta)` times as
    long. Start with a warm-up of the learning rate.

    The state of a matrix is m + n + 1 numbers of four bytes. Other parameters take Adam's step,
    unscaled by α. A row or a column whose gradients were all zero has a zero update.

    In a matrix of blocks without common rows and columns (grouped or block-diagonal layers) the
    iteration converges to the leading block, and the scales of all others decay with every
    iteration: their updates are too large by orders of magnitude, and the limit of growth does not
    see it, because the first one has none. Leave such matrices out (``where``), or name the blocks
    as independent matrices (``axes``).

    Args:
      decay: β.
      iterations: number of computations of s and q, each of which reads G twice.
      b1, b2, eps, mu_dtype: Adam's for the other parameters, as in ``optax.scale_by_adam``.
      scale: α, a number or a traced scalar.
      norm_growth_limit: γ; None: no limit. Put the learning rate after this transformation. There
        is no limit after a zero update.
      where: which matrices are scaled, in the forms of :func:`.low_rank_project`; by default hidden
        matrices of any size.
      axes: see :func:`.low_rank_project`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`.ScaleByRacsState`.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value; at ``init``
        if ``where`` selects no parameter, or a parameter that is not a floating-point matrix of at
        least 16 bits; at ``update`` for gradients of other shapes than at ``init``. A non-finite
        gradient gives a non-finite update, and leaves the state of its matrix unchanged.

    References:
      Gong et al., Towards efficient optimizer design for LLM via structured Fisher approximation
      with a low-rank extension (2025), arXiv 2502.07752: equation 16 for s and q, with one gradient
      for the expectation, q = 1 at first and five steps as in the paper; algorithm 1. The paper's
      state is bfloat16, and it does not mention rows of zeros.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tx = ng.contrib.scale_by_racs()
      >>> state = tx.init({"w": jnp.ones((6, 8)), "b": jnp.ones(8)})
      >>> state.rows["w"].shape, state.columns["w"].shape, state.adam.mu["b"].shape
      ((6,), (8,), (8,))
    """
    check_decay("decay", decay)
    check_integer("iterations", iterations, minimum=1)
    check_number("scale", scale, below=math.inf)
    check_growth_limit(norm_growth_limit)
    settings = PlanSettings(None, where, axes)
    check_adam(b1, b2, eps, mu_dtype)
    adam = adam_in_float32(b1, b2, eps, mu_dtype=mu_dtype)

    @own_arithmetic
    def init_fn(params):
        if current_subspace() is not None:
            raise ValueError(
                "scale_by_racs inside a subspace: a refresh would not transport its scales of rows "
                "and columns; put it after project_back, or outside of the chain"
            )
        plans = plan_tree(settings, params)
        require_matrices(
            settings, plans, params, "where selects no matrix to be scaled by row and column"
        )
        leaves, treedef = jax.tree.flatten(params)
        empty = [
            _empty(plan.unnamed, leaf, norm_growth_limit is not None) if plan else _NOTHING
            for plan, leaf in zip(plans, leaves, strict=True)
        ]
        return ScaleByRacsState(
            adam.init(without_matrices(treedef, leaves, plans)),
            *(treedef.unflatten(entries[field] for entries in empty) for field in range(3)),
        )

    @own_arithmetic
    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        plans = plan_tree(settings, updates)
        G, treedef = jax.tree.flatten(updates)
        check_type(state, ScaleByRacsState, "optimizer")
        for mode, field in enumerate(("rows", "columns")):
            forms = [Form((*p.batch_shape, *p.mode_shape(mode))) if p else None for p in plans]
            check_stored(updates, forms, getattr(state, field), f"scales of the {field}", "where")
        has_limit = norm_growth_limit is not None
        forms = [Form(p.batch_shape) if p and has_limit else None for p in plans]
        check_stored(updates, forms, state.update_norm, "update_norm", "norm_growth_limit")
        forms = [
            None if plan else form_in(mu_dtype, jnp.shape(g))
            for plan, g in zip(plans, G, strict=True)
        ]
        check_stored(updates, forms, state.adam.mu, "moments", "where or mu_dtype")
        check_params(updates, params)

        N, adam_state = adam.update(without_matrices(treedef, G, plans), state.adam)
        out, q, s, norms = (treedef.flatten_up_to(x) for x in (N, *state[1:]))
        found = for_each(
            _scaled,
            [plan and (plan.unnamed, iterations) for plan in plans],
            (G, q, s, norms),
            (decay, scale, norm_growth_limit),
        )
        out, *fields = map(treedef.unflatten, merged(found, out, q, s, norms))
        adam_state = with_dtypes_of(state.adam, adam_state)
        return with_update_dtypes(out, updates, params), ScaleByRacsState(adam_state, *fields)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_NOTHING = (optax.MaskedNode(),) * 3


@kernel("plan", "with_norm")
def _empty(plan, leaf, with_norm):
    """Initial state of one matrix, sharded as sums of the gradient."""
    zeros = jnp.zeros_like(leaf, dtype=jnp.float32)
    norm = jnp.sum(zeros, plan.matrix_axes) if with_norm else optax.MaskedNode()
    return *(_over_others(plan, mode, zeros) for mode in (0, 1)), norm


def _scaled(settings, operands, shared):
    """The update of one parameter, and its state. q is of the rows, s of the columns."""
    (plan, iterations), (G, q, s, last_norm) = settings, operands
    decay, scale, limit = shared
    dtype, G = G.dtype, G.astype(jnp.float32)
    new = fixed_point(plan, G, iterations)
    q, s = _averaged(plan, (q, s), new, decay)
    U = _on_axes(plan, 0, inverse_root(q)) * G * _on_axes(plan, 1, inverse_root(s))
    if limit is not None:
        U, last_norm = limit_growth(plan.batch, U, last_norm, limit)
    return (scale * U).astype(dtype), q, s, last_norm


def fixed_point(plan: LeafPlan, G: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Scales of the rows and of the columns of each matrix, without averages.

    Args:
      plan: of matrices.
      G: float32, the gradient.
      iterations: number of computations of both.

    Returns:
      batch + the axes of the rows, batch + the axes of the columns, float32: zero for rows and
      columns of zeros. Scales of the longer side have the unit of G squared.
    """
    m, n = plan.mode_sizes
    short, long = (0, 1) if m <= n else (1, 0)
    # Products of squares leave the range of float32 for gradients below 1e-9 or above 1e9.
    largest = jnp.max(jnp.abs(G), plan.matrix_axes, keepdims=True)
    square = jnp.square(G / jnp.where(largest > 0, largest, 1.0))

    def times(mode, x):
        """``G² x / ‖x‖²`` on the axes of one mode, for x of the other."""
        product = _over_others(plan, mode, _on_axes(plan, 1 - mode, x) * square)
        return _over_squared_norm(plan, product, x)

    # q = 1, whose squared norm is its number of entries.
    s = _over_others(plan, long, square) / plan.mode_sizes[short]
    s = jax.lax.fori_loop(0, iterations - 1, lambda _, s: times(long, times(short, s)), s)
    q = times(short, s)
    s = s * jnp.square(largest).reshape(plan.batch_shape + (1,) * len(plan.modes[long]))
    return (q, s) if short == 0 else (s, q)


def _averaged(plan, old, new, decay):
    """``β c + (1 − β) c'`` of both sides; c for a matrix with a non-finite c' of either."""
    own = [tuple(range(len(plan.batch), x.ndim)) for x in new]
    of_rows, of_columns = (jnp.all(jnp.isfinite(x), a) for x, a in zip(new, own, strict=True))
    return [
        jnp.where(
            jnp.expand_dims(of_rows & of_columns, axes), decay * c + (1 - decay) * x, c
        ).astype(c.dtype)
        for c, x, axes in zip(old, new, own, strict=True)
    ]


def _over_squared_norm(plan, x, of):
    """``x / ‖of‖²`` for each matrix; x if ``of`` is zero."""
    square = jnp.sum(jnp.square(of), tuple(range(len(plan.batch), of.ndim)))
    square = square.reshape(plan.batch_shape + (1,) * (x.ndim - len(plan.batch)))
    return x / jnp.where(square == 0, 1.0, square)


def _over_others(plan, mode, x):
    """Sum over the other side: batch + the axes of one mode."""
    return sum_for_phi(side_axes(plan, mode), x)


def _on_axes(plan, mode, x):
    """Expand to as many axes as the parameter, for broadcasting."""
    return on_axes_of_gradient(side_axes(plan, mode), x)


def racs_adamw(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.9,
    iterations: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    scale: float = 0.05,
    norm_growth_limit: float | None = 1.01,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RACS: gradients scaled by row and by column, AdamW for embeddings, head and vectors.

    .. math::
      W \leftarrow W - \eta\,(U + \omega W)

    with U of :func:`.scale_by_racs`, whose state of an m × n matrix is m + n + 1 numbers without
    moments. Embeddings, output head and vectors take plain AdamW steps with the same learning rate.

    It is this composition::

      optax.chain(
          ng.contrib.scale_by_racs(
              decay=decay, iterations=iterations, b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype,
              scale=scale, norm_growth_limit=norm_growth_limit, where=where, axes=axes),
          optax.add_decayed_weights(weight_decay, mask),
          optax.scale_by_learning_rate(learning_rate),
      )

    Args:
      learning_rate: η, a number or a schedule. The paper pre-trains with 0.02, a tenth of the steps
        as warm-up and a cosine to a tenth. It does not state the rate of Adam's parameters.
      decay, iterations, b1, b2, eps, mu_dtype, norm_growth_limit, where, axes: see
        :func:`.scale_by_racs`.
      weight_decay: ω, decoupled; acts on the whole weight, unscaled by α. 0 in the paper.
      mask: which parameters decay, as in ``optax.adamw``.
      scale: α; in the paper 0.05 for LLaMA 60M to 350M, 0.02 for 1.3B.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as :func:`.scale_by_racs`.

    References:
      Gong et al. (2025), arXiv 2502.07752, algorithm 1 and table 9; see :func:`.scale_by_racs`. As
      in the paper, attention and MLPs are scaled, and Adam trains all other parameters, including
      the output head.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> state = ng.contrib.racs_adamw(1e-2).init({"w": jnp.ones((6, 8))})
      >>> state[0].rows["w"].shape, state[0].columns["w"].shape
      ((6,), (8,))
    """
    return descent(
        scale_by_racs(
            decay=decay,
            iterations=iterations,
            b1=b1,
            b2=b2,
            eps=eps,
            mu_dtype=mu_dtype,
            scale=scale,
            norm_growth_limit=norm_growth_limit,
            where=where,
            axes=axes,
        ),
        learning_rate,
        weight_decay,
        mask,
    )
