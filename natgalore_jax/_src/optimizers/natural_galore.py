"""Natural GaLore in one object, and drop-ins for ``optax.adamw``."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.basis import Method
from natgalore_jax._src.kernels.residual import Rule
from natgalore_jax._src.kernels.rotation import Transition
from natgalore_jax._src.low_bits.adam import adam_with_bits, scale_by_adam_8bit
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import check_number, check_rates
from natgalore_jax._src.params.plan import Side
from natgalore_jax._src.params.where import Where, hidden_matrices, selected
from natgalore_jax._src.subspace.chain import Composite, chain
from natgalore_jax._src.subspace.compact_fisher import compact_natural_gradient
from natgalore_jax._src.subspace.project import low_rank_project
from natgalore_jax._src.subspace.project_back import NORM_GROWTH_LIMIT, ProjectBack, project_back
from natgalore_jax._src.subspace.woodbury import DampingMode, Schedule, woodbury_natural_gradient

# scale, residual, norm_growth_limit, residual_scale
_CLOSER_DEFAULTS = (1.0, "none", NORM_GROWTH_LIMIT, None)


def natural_galore(
    rank: int | tuple[int, ...] = 128,
    update_interval: int = 200,
    side: Side = "short",
    method: Method = "power",
    transition: Transition = "rotate",
    stagger: bool | None = None,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    basis_dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
    history: int = 10,
    damping: float | Schedule = 0.03,
    damping_mode: DampingMode = "relative",
    history_dtype: jax.typing.DTypeLike | None = None,
    scale: float = 1.0,
    residual: Rule = "none",
    norm_growth_limit: float | None = NORM_GROWTH_LIMIT,
    residual_scale: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Projection, natural gradient and projection back in one transformation.

    In :func:`natgalore_jax.chain` it opens a subspace for the following transformations, so that
    the moments of an inner optimizer are low-rank. Anywhere else, such as in ``optax.chain``, it
    maps full-shape gradients to full-shape natural gradients :math:`\alpha P F^{-1} P^\top G`, and
    the following transformations have full-size states; so do those after a wrapper around it, such
    as ``optax.masked`` or ``optax.inject_hyperparams``.

    Args:
      rank, update_interval, side, method, transition, stagger, where, axes, basis_dtype, seed:
        see :func:`low_rank_project`.
      history, damping, damping_mode, history_dtype: see :func:`woodbury_natural_gradient`.
      scale, residual, norm_growth_limit, residual_scale: see :func:`project_back`. With
        ``residual="fisher"`` the learning rate belongs after ``project_back``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as its parts.

    References:
      Natural GaLore (2024), sections 2.2 to 2.4, for the natural gradient in a subspace.

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> params = {"w": jnp.ones((6, 8))}
      >>> low = ng.chain(ng.natural_galore(rank=2), optax.adamw(1e-3)).init(params)
      >>> full = optax.chain(ng.natural_galore(rank=2), optax.adamw(1e-3)).init(params)
      >>> [optax.tree.get(state, "mu")["w"].shape for state in (low, full)]
      [(2, 8), (6, 8)]
    """
    parts = (
        low_rank_project(
            rank=rank,
            update_interval=update_interval,
            side=side,
            method=method,
            transition=transition,
            stagger=stagger,
            where=where,
            axes=axes,
            basis_dtype=basis_dtype,
            seed=seed,
        ),
        woodbury_natural_gradient(history, damping, damping_mode, history_dtype),
    )
    given = (scale, residual, norm_growth_limit, residual_scale)
    closer = project_back(*given)
    closed = chain(*parts, closer)
    tx = Composite(*closed)
    tx.members, tx.parts, tx.closer = closed.members, parts, closer
    # Arrays from optax.inject_hyperparams may be traced and cannot be compared: not defaults.
    tx.closer_is_default = not any(isinstance(x, jax.Array) for x in given) and (
        given == _CLOSER_DEFAULTS
    )
    return tx


def natural_galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | tuple[int, ...] = 128,
    update_interval: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    scale: float = 1.0,
    residual: Rule = "fisher",
    residual_scale: float | None = None,
    unprojected_ratio: float = 4.0,
    side: Side = "short",
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    moment_bits: Literal[8] | None = None,
    basis_dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with natural gradients in a low-rank subspace and outside of it.

    Differences from ``optax.adamw``:

    * ``learning_rate`` is the rate of the hidden matrices. Embeddings, head, norms and biases take
      AdamW steps with Nesterov's momentum at ``unprojected_ratio`` times that rate. A single rate
      that is low enough for the hidden matrices is too low for embedding and head
      (docs/experiments.md, "The ratio of the two rates").
    * Hidden matrices (:func:`hidden_matrices`) keep their moments in a subspace of ``rank``
      dimensions, so that the state is a fraction of AdamW's: :func:`memory_report`.
    * Their update is

    .. math::
      R = P^\top G, \quad N = F_R^{-1/2}\,\mathrm{Adam}(R), \quad E = G - P P^\top G,

      W \leftarrow W - \eta\,\bigl(\alpha P N + \sigma E F_E^{-1/2} + \omega W\bigr)

    :math:`F_R` is the diagonal Fisher matrix of the directions of the subspace
    (:func:`compact_natural_gradient`), :math:`F_E` the Fisher matrix of the columns of the residual
    (:func:`project_back`, "fisher"). With a sign they take r + n + 1 numbers for a matrix, so that
    the state is as small as GaLore's. Adam has Nesterov's momentum, entries of N that oppose the
    newest gradient are dropped, and the leading singular value of the update is clipped
    (``singular_limit`` of :func:`project_back`). docs/experiments.md has the gain of each part.

    It equals this composition, which gives access to all other settings (except that parameters
    that ``where`` selects are never multiplied by ``unprojected_ratio``)::

      ng.chain(
          ng.low_rank_project(rank, update_interval, side, where=where, axes=axes,
                              basis_dtype=basis_dtype, seed=seed),
          ng.compact_natural_gradient(
              optax.scale_by_adam(b1, b2, eps, nesterov=True), cautious=True),
          ng.project_back(scale, residual, residual_scale=residual_scale, singular_limit=0.2),
          optax.masked(optax.scale(unprojected_ratio), lambda params: jax.tree.map_with_path(
              lambda path, leaf: not ng.hidden_matrices(path, leaf), params)),
          optax.add_decayed_weights(weight_decay, mask),
          optax.scale_by_learning_rate(learning_rate),
      )

    Args:
      learning_rate: η of the hidden matrices, a number or a schedule. 0.005 to 0.01 are good at a
        width of 128. Halve the rate and double ``unprojected_ratio`` where the width doubles
        (docs/experiments.md, "A larger model").
      rank, update_interval, side, where, axes, basis_dtype, seed: see :func:`low_rank_project`.
        With a tuple for ``rank`` the Fisher matrix has ``modes=len(rank)``.
      b1, b2, eps: Adam's, as in ``optax.adamw``. Adam runs on the low-rank gradient.
      weight_decay: ω, decoupled; acts on the whole weight, unscaled by α.
      mask: which parameters decay, as in ``optax.adamw``.
      scale, residual, residual_scale: α, the rule of the residual and σ; see :func:`project_back`.
        Leave α at 1 and set ``learning_rate``. Use ``residual="none"`` for :func:`.low_rank_steps`
        and :func:`.data_parallel_step`.
      unprojected_ratio: the rate of the parameters that are neither projected nor hidden matrices,
        over ``learning_rate``. Hidden matrices that ``where`` leaves out have ``learning_rate``.
      moment_bits: None: Adam's moments in the dtype of the parameter. 8: both moments in 8 bits for
        arrays of at least 4096 entries (:func:`scale_by_adam_8bit`).

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as its parts.

    References:
      Of its parts: :func:`compact_natural_gradient`, :func:`project_back`,
      :func:`clip_leading_singular_value`; Dozat, Nesterov momentum in Adam (2016).

    Example:
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> target = jnp.outer(jnp.arange(8.0), jnp.arange(6.0))
      >>> loss = lambda p: jnp.mean((p["w"] - target) ** 2)
      >>> tx = ng.natural_galore_adamw(optax.linear_schedule(4.0, 0.0, 100), rank=2)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> params = {"w": jnp.zeros((8, 6))}
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 0.05 * jnp.mean(target**2))
      True
    """
    return _adamw_in(
        adam_with_bits(moment_bits, b1, b2, eps, nesterov=True),
        project_back(scale, residual, residual_scale=residual_scale, singular_limit=0.2),
        *(unprojected_ratio, weight_decay, mask, learning_rate),
        rank=rank,
        update_interval=update_interval,
        side=side,
        where=where,
        axes=axes,
        basis_dtype=basis_dtype,
        seed=seed,
    )


def lean_natural_galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | tuple[int, ...] = 16,
    update_interval: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    unprojected_ratio: float = 4.0,
    side: Side = "short",
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural GaLore with the smallest state: about a byte for each number of embedding and head.

    Differences from :func:`natural_galore_adamw`:

    * The rank is small, because most of what a high rank brings comes from the residual update
      (docs/experiments.md).
    * The moments and bases of hidden matrices are stored in 8 bits.
    * Embedding and output head have a momentum in 8 bits and factored second moments
      (:func:`scale_by_adam_8bit`), not two float32 numbers for each weight.

    It equals this composition, which gives access to all other settings (except that parameters
    that ``where`` selects are never multiplied by ``unprojected_ratio``)::

      ng.chain(
          ng.low_rank_project(rank, update_interval, side, where=where, axes=axes,
                              basis_dtype="int8", seed=seed),
          ng.compact_natural_gradient(
              ng.scale_by_adam_8bit(b1, b2, eps, nesterov=True, min_size=256,
                                    factored=None), cautious=True),
          ng.project_back(1.0, "fisher", singular_limit=0.2),
          optax.masked(optax.scale(unprojected_ratio), lambda params: jax.tree.map_with_path(
              lambda path, leaf: not ng.hidden_matrices(path, leaf), params)),
          optax.add_decayed_weights(weight_decay, mask),
          optax.scale_by_learning_rate(learning_rate),
      )

    Args:
      learning_rate: η of the hidden matrices, a number or a schedule. 0.007 with an
        ``unprojected_ratio`` of 2 is the best at a width of 128; see :func:`natural_galore_adamw`.
      rank: a sixteenth of the width or less.
      update_interval, b1, b2, eps, weight_decay, mask, unprojected_ratio, side, where, axes, seed:
        see :func:`natural_galore_adamw`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as its parts.

    References:
      Of :func:`natural_galore_adamw` and :func:`scale_by_adam_8bit`.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> params = {"embed": jnp.ones((1024, 128)), "mlp": jnp.ones((128, 512))}
      >>> report = ng.memory_report(ng.lean_natural_galore_adamw(0.005, rank=8), params)
      >>> report.total_state_bytes < 0.1 * report.adamw_state_bytes
      True
    """
    return _adamw_in(
        scale_by_adam_8bit(b1, b2, eps, nesterov=True, min_size=256, factored=None),
        project_back(1.0, "fisher", singular_limit=0.2),
        *(unprojected_ratio, weight_decay, mask, learning_rate),
        rank=rank,
        update_interval=update_interval,
        side=side,
        where=where,
        axes=axes,
        basis_dtype="int8",
        seed=seed,
    )


def _adamw_in(
    adam: optax.GradientTransformation,
    closer: ProjectBack,
    unprojected_ratio: float,
    weight_decay: float,
    mask: Any,
    learning_rate: optax.ScalarOrSchedule,
    **projection: Any,
) -> optax.GradientTransformationExtraArgs:
    """Natural GaLore with ``adam`` in the subspace of ``low_rank_project(**projection)``."""
    check_rates(learning_rate, weight_decay)
    opener = low_rank_project(**projection)
    return chain(
        opener,
        compact_natural_gradient(adam, modes=opener.number_of_modes, cautious=True),
        closer,
        _scale_unprojected(unprojected_ratio, opener.plan.where),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_unprojected(ratio: float, where: Where) -> optax.GradientTransformationExtraArgs:
    """Multiply the updates of all but hidden matrices and what ``where`` selects by ``ratio``."""
    check_number("unprojected_ratio", ratio)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
        scaled = [
            leaf
            if is_selected or hidden_matrices(path, leaf)
            else jnp.multiply(ratio, leaf).astype(leaf.dtype)
            for (path, leaf), is_selected in zip(leaves, selected(where, updates), strict=True)
        ]
        return treedef.unflatten(scaled), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
