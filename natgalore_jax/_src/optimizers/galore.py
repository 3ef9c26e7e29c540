"""GaLore and Fira: AdamW in a low-rank subspace."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from natgalore_jax._src.kernels.basis import Method
from natgalore_jax._src.kernels.residual import Rule
from natgalore_jax._src.low_bits.adam import adam_with_bits
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import check_rates
from natgalore_jax._src.params.plan import Side
from natgalore_jax._src.params.where import Where, hidden_matrices
from natgalore_jax._src.subspace.chain import chain
from natgalore_jax._src.subspace.project import low_rank_project
from natgalore_jax._src.subspace.project_back import project_back


def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | tuple[int, ...] = 128,
    update_interval: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    scale: float = 0.25,
    residual: Rule = "none",
    side: Side = "short",
    method: Method = "power",
    stagger: bool | None = None,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    moment_bits: Literal[8] | None = None,
    basis_dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW in a low-rank subspace (GaLore), without the natural gradient.

    .. math::
      R = P^\top G, \quad N = \mathrm{Adam}(R), \quad W \leftarrow W - \eta\,(\alpha P N + \omega W)

    With ``residual="fira"`` it is Fira. With ``method="svd", stagger=False`` it has
    GaLore's published refresh; step by step: :func:`published_galore_adamw`.

    It equals this composition, which gives access to all other settings::

      ng.chain(
          ng.low_rank_project(rank, update_interval, side, method, "keep", stagger, where, axes,
                              basis_dtype, seed),
          optax.scale_by_adam(b1, b2, eps),
          ng.project_back(scale, residual),
          optax.add_decayed_weights(weight_decay, mask),
          optax.scale_by_learning_rate(learning_rate),
      )

    Args:
      learning_rate: η of the unprojected parameters, a number or a schedule; projected parameters
        have the rate α η. This is the parametrisation of the GaLore papers.
      weight_decay, mask, b1, b2, eps, moment_bits: see :func:`natural_galore_adamw`.
      rank, update_interval, side, method, stagger, where, axes, basis_dtype, seed: see
        :func:`low_rank_project`. The moments are kept at a refresh, as published; with method
        "power" this is nearly the same as rotating them.
      scale, residual: see :func:`project_back`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as its parts.

    References:
      Zhao et al., GaLore (2024), "Adam with GaLore" in appendix B; Chen et al., Fira (2024), arXiv
      2410.01623.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> state = ng.galore_adamw(1e-2, rank=2).init({"w": jnp.ones((6, 8))})
      >>> state[1].nu["w"].shape
      (2, 8)
    """
    check_rates(learning_rate, weight_decay)
    return chain(
        low_rank_project(
            rank=rank,
            update_interval=update_interval,
            side=side,
            method=method,
            transition="keep",
            stagger=stagger,
            where=where,
            axes=axes,
            basis_dtype=basis_dtype,
            seed=seed,
        ),
        adam_with_bits(moment_bits, b1, b2, eps),
        project_back(scale, residual),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
