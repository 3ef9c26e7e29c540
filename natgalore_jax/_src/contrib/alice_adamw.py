"""Alice with weight decay and a learning rate."""

from typing import Any

import optax

from natgalore_jax._src.contrib.alice import scale_by_alice
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.where import Where, hidden_matrices


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
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> target = jnp.outer(jnp.arange(8.0), jnp.arange(6.0))
      >>> loss = lambda p: jnp.mean((p["w"] - target) ** 2)
      >>> rate = optax.linear_schedule(1.0, 0.0, 100)
      >>> tx = ng.contrib.alice_adamw(rate, rank=2, leading=1, update_interval=10, scale=1.0)
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
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
