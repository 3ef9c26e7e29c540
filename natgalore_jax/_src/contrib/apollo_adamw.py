"""APOLLO and APOLLO-Mini as drop-ins for ``optax.adamw``."""

import math
from typing import Any

import optax

from natgalore_jax._src.contrib.apollo import scale_by_apollo
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.where import Where, hidden_matrices


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
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> target = jnp.outer(jnp.arange(8.0), jnp.arange(6.0))
      >>> loss = lambda p: jnp.mean((p["w"] - target) ** 2)
      >>> tx = ng.contrib.apollo_adamw(0.5, rank=2, norm_growth_limit=None)
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
    return optax.chain(
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
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
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
