"""Alice: Adam in a tracked, partly switched eigenbasis, and compensation of the residual."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.contrib.alice_kernels import (
    Switch,
    compensated,
    low_rank_step,
    switched_basis,
)
from natgalore_jax._src.contrib.descent import descent
from natgalore_jax._src.kernels.factored_update import phi_axes
from natgalore_jax._src.kernels.kernel import kernel, own_arithmetic
from natgalore_jax._src.kernels.random import matrix_keys, numbers_of
from natgalore_jax._src.kernels.stacks import for_each, merged
from natgalore_jax._src.low_bits.adam import adam_in_float32
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import (
    check_adam,
    check_decay,
    check_growth_limit,
    check_integer,
    check_interval,
    check_number,
    check_seed,
    check_static,
    check_unused,
)
from natgalore_jax._src.params.placement import zeros_on_axes
from natgalore_jax._src.params.plan import PlanSettings, plan_tree, without_matrices
from natgalore_jax._src.params.where import Where, hidden_matrices
from natgalore_jax._src.states.entries import OwnBasis, register_type
from natgalore_jax._src.states.tree_checks import (
    Form,
    check_moments,
    check_params,
    check_stored,
    check_type,
    flatten_like,
    with_dtypes_of,
    with_update_dtypes,
)
from natgalore_jax._src.subspace.subspace import init_low_rank

# Adam's decays for unprojected parameters, as in the paper.
ADAM_B1, ADAM_B2 = 0.9, 0.999


class ScaleByAliceState(NamedTuple):
    """State of :func:`.scale_by_alice`."""

    #: An optax.ScaleByAdamState. mu and nu are trees of parameters: batch + (rank, n) or (m, rank)
    #: where projected, else the parameter's shape; dtype of the parameter.
    adam: Any
    #: U. The tree of parameters: batch + the axes of the shorter side + (rank,), dtype of the
    #: parameter, zero before the first gradient; MaskedNode where unprojected.
    basis: Any
    #: The average of the projected gradient times its transpose. The tree of parameters: batch +
    #: (rank, rank), float32; MaskedNode where unprojected, or without tracking.
    tracked: Any
    #: p. The tree of parameters: batch + the axes of the longer side, float32, the average squared
    #: norm of each column of the residual; MaskedNode where unprojected.
    residual_energy: Any
    #: φ. The tree of parameters: batch, float32, the norm of each matrix's last compensation;
    #: MaskedNode where unprojected, or without a limit.
    residual_norm: Any


register_type(ScaleByAliceState, OwnBasis())


def scale_by_alice(
    rank: int = 128,
    update_interval: int = 200,
    leading: int | None = None,
    b1: float = 0.9,
    b2: float = 0.9,
    b3: float = 0.999,
    eps: float = 1e-8,
    scale: float = 0.3,
    compensation_scale: float = 0.4,
    norm_growth_limit: float | None = 1.01,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in the leading eigenbasis of averaged gradients, and compensation of the residual.

    For one matrix with gradient G, transposed if its columns are the shorter side, at step 1 and
    every T steps

    .. math::
      Q = \beta_3 U \tilde Q U^\top + (1 - \beta_3)\, G G^\top, \qquad
      U' = \mathrm{eigenvectors}(Q), \qquad U = [U'_{:,1 \dots l}, \; V]

    with V (m, r − l) sampled without replacement from a basis of the complement of the r columns of
    U'. At every step, squares by element,

    .. math::
      \begin{align*}
      R &= U^\top G, \qquad \tilde Q \leftarrow \beta_3 \tilde Q + (1 - \beta_3) R R^\top, \\
      M &\leftarrow \beta_1 M + (1 - \beta_1) R, \qquad
        V \leftarrow \beta_2 V + (1 - \beta_2) R^{\odot 2}, \qquad
        \omega = M / (\sqrt V + \varepsilon), \\
      p_j &\leftarrow \beta_1 p_j + (1 - \beta_1)
        (\lVert G_{:j} \rVert^2 - \lVert R_{:j} \rVert^2), \qquad
        C = \sqrt{m - r}\, (G - U R) \,\mathrm{diag}(p)^{-1/2}, \\
      C &\leftarrow C \cdot \min(1, \gamma \varphi / \lVert C \rVert), \qquad
        S = \alpha\, (U \omega + \alpha_c C)
      \end{align*}

    with φ the norm of the last C. ``b3=0`` is Alice-0, without tracking: Q is from one gradient. As
    in the paper, there is no bias correction, and M, V and :math:`\tilde Q` are kept at a refresh.
    U' is one step of subspace iteration from U: a QR factorisation of Q U, and an r × r
    eigendecomposition. The first U' is an eigendecomposition of :math:`G G^\top`, m × m. The basis
    of the complement is from an m × m QR factorisation. These call LAPACK for one matrix at a time,
    replicated on every device.

    The state of a matrix is mr + 2rn numbers in its dtype and n + 1 in float32, and with tracking
    :math:`r^2` more. Unprojected parameters take Adam's step with decays 0.9 and 0.999, unscaled.

    Args:
      rank: r, clipped per matrix to its shorter side.
      update_interval: T. The basis changes at the steps 1, T, 2T, ..., counted from one.
      leading: l, number of leading eigenvectors that are kept; None: 5/16 of r, which is 40 of 128
        and 160 of 512 as in the paper. It is clipped to at most r, and to at least 2r − m, because
        the complement has m − r vectors.
      b1, b2, b3: β₁ of M and p, β₂ of V, β₃ of the tracked matrix. ``b3`` is a Python number,
        because the state has no tracked matrix if it is zero.
      eps: ε, here and in Adam.
      scale: α, a number or a traced scalar.
      compensation_scale: α_c, a number or a traced scalar.
      norm_growth_limit: γ; None: no limit.
      where, axes: see :func:`.low_rank_project`.
      seed: of the random samples, which depend on the number of the parameter in the tree too.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`.ScaleByAliceState`.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value; at ``init``
        as :func:`.low_rank_project`; at ``update`` for gradients of other shapes than at ``init``.
        A zero or non-finite gradient leaves the basis unchanged. A non-finite gradient also leaves
        :math:`\tilde Q` and p unchanged, but remains in M and V of its matrix: put
        ``optax.apply_if_finite`` around the optimizer.

    References:
      Gong et al., Towards efficient optimizer design for LLM via structured Fisher approximation
      with a low-rank extension (2025), arXiv 2502.07752, algorithms 2, 3, 4 and 10. Choices where
      the paper is silent: the first basis (algorithm 10 would start from zeros), signs of
      eigenvectors (the largest entry is positive), ε, and C = 0 where p is zero.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tx = ng.contrib.scale_by_alice(rank=2, leading=1)
      >>> state = tx.init({"w": jnp.ones((6, 8)), "b": jnp.ones(8)})
      >>> state.basis["w"].shape, state.adam.mu["w"].shape, state.tracked["w"].shape
      ((6, 2), (2, 8), (2, 2))
      >>> state.residual_energy["w"].shape, state.adam.mu["b"].shape
      ((8,), (8,))
    """
    check_integer("rank", rank, minimum=1)
    check_interval("update_interval", update_interval)
    if leading is not None:
        check_integer("leading", leading, minimum=0)
        if leading > rank:
            raise ValueError(f"leading must be at most rank={rank}, got {leading}")
    check_adam(b1, b2, eps)
    check_static("b3", b3, "a Python number")
    check_decay("b3", b3)
    check_number("scale", scale, below=math.inf)
    check_number("compensation_scale", compensation_scale, below=math.inf)
    check_growth_limit(norm_growth_limit)
    has_none = isinstance(compensation_scale, (int, float)) and compensation_scale == 0
    if has_none and norm_growth_limit is not None:
        where_unused = "without a compensation (compensation_scale=0)"
        check_unused("norm_growth_limit", norm_growth_limit, 1.01, where_unused)
    check_seed(seed)
    settings = PlanSettings(int(rank), where, axes)
    adam: Any = adam_in_float32(ADAM_B1, ADAM_B2, eps)
    switch = Switch(None if leading is None else int(leading), float(b3))
    has_limit = norm_growth_limit is not None

    @own_arithmetic
    def init_fn(params):
        plans, factors, adam_state = init_low_rank(settings, adam, params)
        treedef = jax.tree.structure(params)
        # Fields of the state after the first, for each parameter.
        entries = [
            _empty(plan.unnamed, switch, has_limit, *factor, mu) if plan else _NOTHING
            for plan, factor, mu in zip(
                plans, factors, treedef.flatten_up_to(adam_state.mu), strict=True
            )
        ]
        return ScaleByAliceState(
            adam_state, *(treedef.unflatten(e[i] for e in entries) for i in range(len(_NOTHING)))
        )

    @own_arithmetic
    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        plans = plan_tree(settings, updates)
        G, treedef = jax.tree.flatten(updates)
        check_type(state, ScaleByAliceState, "optimizer")
        check_moments(updates, plans, state.adam.mu, None, "rank or where")
        tracked = [_tracked_form(p) if p and switch.b3 > 0 else None for p in plans]
        check_stored(updates, tracked, state.tracked, "tracked", "b3")
        norms = [Form(p.batch_shape) if p and has_limit else None for p in plans]
        check_stored(updates, norms, state.residual_norm, "residual_norm", "norm_growth_limit")
        check_params(updates, params)
        bases = flatten_like(updates, state.basis, "the parameters at init")
        mus, nus, tracked, residual_energy, norms = (
            treedef.flatten_up_to(x) for x in (state.adam.mu, state.adam.nu, *state[2:])
        )

        count = state.adam.count
        due = (count == 0) | ((count + 1) % update_interval == 0)
        mu, nu, own = (without_matrices(treedef, x, plans) for x in (mus, nus, G))
        N, inner = adam.update(own, state.adam._replace(mu=mu, nu=nu))
        out, new_mus, new_nus = (treedef.flatten_up_to(x) for x in (N, inner.mu, inner.nu))
        found = for_each(
            _switched,
            [plan and (plan.unnamed, switch, int(seed)) for plan in plans],
            (numbers_of(plans), G, bases, tracked),
            (due, count),
            one_by_one=True,
        )
        (bases,) = merged(found, bases)
        found = for_each(
            _stepped,
            [plan and (plan.unnamed, switch.b3) for plan in plans],
            (G, bases, mus, nus, tracked, residual_energy, norms),
            ((b1, b2), eps, (scale, compensation_scale, norm_growth_limit)),
        )
        columns = merged(found, out, new_mus, new_nus, tracked, residual_energy, norms)
        out, mu, nu, *fields = map(treedef.unflatten, columns)
        return with_update_dtypes(out, updates, params), ScaleByAliceState(
            with_dtypes_of(state.adam, inner._replace(mu=mu, nu=nu)),
            treedef.unflatten(bases),
            *fields,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_NOTHING = (optax.MaskedNode(),) * 4


def _tracked_form(plan):
    """Form of the tracked matrices of one parameter."""
    (mode,) = plan.projected_modes
    return Form((*plan.batch_shape, plan.rank_of(mode), plan.rank_of(mode)))


@kernel("plan", "switch", "has_limit")
def _empty(plan, switch, has_limit, U, mu):
    """Basis, tracked matrix, p and φ of one parameter before the first gradient."""
    nothing, r = optax.MaskedNode(), U.shape[-1]
    zeros = jnp.zeros_like(mu, dtype=jnp.float32)  # sums of zeros have the sharding of later sums
    of_matrices = zeros_on_axes(mu, len(plan.batch), jnp.float32)[..., None, None]
    tracked = of_matrices + jnp.zeros((r, r), jnp.float32) if switch.b3 > 0 else nothing
    norm = jnp.sum(zeros, tuple(range(len(plan.batch), zeros.ndim))) if has_limit else nothing
    return jnp.zeros_like(U), tracked, jnp.sum(zeros, phi_axes(plan).low), norm


def _switched(settings, operands, shared):
    """Bases of one parameter, in a tuple."""
    (plan, switch, seed), ((leaf, first), *own) = settings, operands
    due, count = shared
    keys = _keys(plan, seed, count, leaf, first)
    return (switched_basis(plan, switch, due, keys, *own),)


def _keys(plan, seed, count, leaf, first=0):
    """A key of random numbers for each matrix of a leaf, at one step."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), leaf)
    return matrix_keys(plan, key, first)


def _stepped(settings, operands, shared):
    """Update of one parameter, and its state."""
    (plan, b3), (G, U, M, V, tracked, residual_energy, norm) = settings, operands
    decays, eps, numbers = shared
    R, omega, M, V, tracked = low_rank_step(plan, b3, decays, eps, G, U, M, V, tracked)
    update, *of_residual = compensated(
        plan, numbers, decays[0], G, U, R, omega, residual_energy, norm
    )
    return update, M, V, tracked, *of_residual


def alice_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_interval: int = 200,
    leading: int | None = None,
    b1: float = 0.9,
    b2: float = 0.9,
    b3: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
    scale: float = 0.3,
    compensation_scale: float = 0.4,
    norm_growth_limit: float | None = 1.01,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Alice, and with ``b3=0`` Alice-0: low-rank Adam with switched bases and compensation.

    .. math::
      W \leftarrow W - \eta\,(S + \omega W)

    with S of :func:`.scale_by_alice`. The state is GaLore's at the same rank, one number for each
    column, and with tracking r² numbers. Unprojected parameters take plain AdamW steps with the
    same learning rate.

    It is this composition::

      optax.chain(
          ng.contrib.scale_by_alice(
              rank=rank, update_interval=update_interval, leading=leading, b1=b1, b2=b2, b3=b3,
              eps=eps, scale=scale, compensation_scale=compensation_scale,
              norm_growth_limit=norm_growth_limit, where=where, axes=axes, seed=seed),
          optax.add_decayed_weights(weight_decay, mask),
          optax.scale_by_learning_rate(learning_rate),
      )

    Args:
      learning_rate: η, a number or a schedule. The paper pre-trains with 0.02, a tenth of the steps
        as warm-up and a cosine to a tenth. It does not say at which rate Adam's parameters train.
      rank: r; in the paper 128 for LLaMA 60M, 256 for 130M and 350M, 512 for 1.3B.
      leading: l; in the paper 40, and 160 for 1.3B; None: 5/16 of r.
      update_interval, b1, b2, b3, eps, norm_growth_limit, axes, seed: see
        :func:`.scale_by_alice`.
      weight_decay: ω, decoupled; acts on the whole weight, unscaled by α. 0 in the paper.
      mask: which parameters decay, as in ``optax.adamw``.
      scale: α; in the paper 0.3, and 0.25 for 1.3B.
      compensation_scale: α_c; in the paper 0.4, and 0.2 for 1.3B.
      where: see :func:`.low_rank_project`. The paper reports both with the output head trained by
        Adam, as here, and by Alice.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as :func:`.scale_by_alice`.

    References:
      Gong et al. (2025), arXiv 2502.07752, algorithm 4 and table 11; see :func:`.scale_by_alice`.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> state = ng.contrib.alice_adamw(1e-2, rank=2, leading=1).init({"w": jnp.ones((6, 8))})
      >>> state[0].basis["w"].shape, state[0].tracked["w"].shape
      ((6, 2), (2, 2))
    """
    return descent(
        scale_by_alice(
            rank=rank,
            update_interval=update_interval,
            leading=leading,
            b1=b1,
            b2=b2,
            b3=b3,
            eps=eps,
            scale=scale,
            compensation_scale=compensation_scale,
            norm_growth_limit=norm_growth_limit,
            where=where,
            axes=axes,
            seed=seed,
        ),
        learning_rate,
        weight_decay,
        mask,
    )
