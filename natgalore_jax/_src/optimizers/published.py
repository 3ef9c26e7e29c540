"""Published variants, step for step."""

from typing import Any

import optax

from natgalore_jax._src.optimizers.torch_adam import decay_after_step, scale_by_transformers_adam
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import check_adam, check_rates
from natgalore_jax._src.params.where import Where, hidden_matrices
from natgalore_jax._src.subspace.chain import chain
from natgalore_jax._src.subspace.project import low_rank_project
from natgalore_jax._src.subspace.project_back import project_back
from natgalore_jax._src.subspace.woodbury import woodbury_natural_gradient


def published_galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_interval: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Any = None,
    side: str = "short",
    where: Where = hidden_matrices,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore as in ``galore-torch`` 1.0 (``GaLoreAdamW``), to reproduce published numbers.

    It has an exact SVD of every matrix in the same step, moments kept at a refresh, ε inside the
    bias correction, and weight decay after the step. For training use :func:`galore_adamw`, whose
    refresh is many times faster.

    Args:
      learning_rate, rank, update_interval, scale, b1, b2, eps, weight_decay, mask, where, axes: as
        in :func:`galore_adamw`, with the defaults of ``galore-torch``.
      side: ``"short"`` is its "std", ``"long"`` its "reverse_std" (which, unlike here, projects
        the columns of a square kernel (in, out)), ``"both"`` its "full".

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as :func:`low_rank_project` and :func:`project_back`.

    References:
      Zhao et al., GaLore (2024), and its package ``galore-torch`` 1.0.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> state = ng.published_galore_adamw(1e-2, rank=2).init({"w": jnp.ones((6, 8))})
      >>> state[1].mu["w"].shape
      (2, 8)
    """
    _check(learning_rate, b1, b2, eps, weight_decay)
    return chain(
        _published_projection(rank, update_interval, side, where, axes),
        scale_by_transformers_adam(b1, b2, eps),
        project_back(scale),
        optax.scale_by_learning_rate(learning_rate),
        decay_after_step(learning_rate, weight_decay, mask),
    )


def published_natural_galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_interval: int = 200,
    scale: float = 0.25,
    history: int = 20,
    damping: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Any = None,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural GaLore as in its published code, which differs from its paper.

    Both sides are projected, :math:`R = P^\top G Q` (r, r); the damping is absolute; history and
    moments are kept at a refresh, so that the Fisher matrix mixes coordinates of two subspaces for
    ``history`` steps.

    The code's online variants of GaLore and Natural GaLore have no preset: their bases take small
    AdamW steps without orthonormalisation, and cease to be projections. Use
    ``galore_adamw(..., method="online")`` or ``low_rank_project(..., method="online")``, with Oja's
    rule and orthonormal bases.

    Args:
      learning_rate, rank, update_interval, scale, history, damping, b1, b2, eps, weight_decay,
        mask, where, axes: as in :func:`natural_galore` and :func:`galore_adamw`, with the defaults
        of the published code; ``damping`` is absolute.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as :func:`natural_galore`.

    References:
      The repository of Natural GaLore (2024). The signs of its bases come from another library:
      runs agree step for step up to the first refresh, and qualitatively after it.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tx = ng.published_natural_galore_adamw(1e-2, rank=2)
      >>> tx.init({"w": jnp.ones((6, 8))})[2].mu["w"].shape
      (2, 2)
    """
    _check(learning_rate, b1, b2, eps, weight_decay)
    return chain(
        _published_projection(rank, update_interval, "both", where, axes),
        woodbury_natural_gradient(history, damping, damping_mode="absolute"),
        scale_by_transformers_adam(b1, b2, eps),
        project_back(scale),
        optax.scale_by_learning_rate(learning_rate),
        decay_after_step(learning_rate, weight_decay, mask),
    )


def paper_natural_galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_interval: int = 200,
    scale: float = 0.25,
    history: int = 10,
    damping: float = 1e-3,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural GaLore as in its paper: one-sided, on the shorter side.

    Equation 12 has ε inside the root. Choices where the paper is silent or differs:

    * the paper has no λ beyond "a small constant", no s, no ε and no rule for the history at a
      refresh; this preset has the published code's λ, the s = 10 of the paper's first version,
      Adam's ε and "keep";
    * equations 10 to 12 have no bias correction; this preset corrects the moments as in Adam, which
      takes the natural gradient in section 2.4;
    * equation 9 has no scale α; this preset has GaLore's (``scale=1.0`` is the equation);
    * section 2.2 always projects on the left; this preset projects the shorter side as GaLore, to
      which section 2.4 refers;
    * the G of section 2.4 has the newest gradient and s earlier gradients; here s in total.

    It is this composition::

      ng.chain(
          ng.low_rank_project(rank, update_interval, method="svd", transition="keep",
                              stagger=False, where=where, axes=axes),
          ng.woodbury_natural_gradient(history, damping, "absolute"),
          optax.scale_by_adam(b1, b2, eps=0.0, eps_root=eps),
          ng.project_back(scale),
          optax.scale_by_learning_rate(learning_rate),
      )

    Args:
      learning_rate, rank, update_interval, scale, history, damping, b1, b2, eps, where, axes: as in
        :func:`natural_galore` and :func:`galore_adamw`; ``damping`` is absolute.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as :func:`natural_galore`.

    References:
      Natural GaLore (2024), section 2.2, equations 9 to 12, and section 2.4, equations 14 to 17.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tx = ng.paper_natural_galore_adamw(1e-2, rank=2)
      >>> tx.init({"w": jnp.ones((6, 8))})[2].mu["w"].shape
      (2, 8)
    """
    _check(learning_rate, b1, b2, eps)
    return chain(
        _published_projection(rank, update_interval, "short", where, axes),
        woodbury_natural_gradient(history, damping, damping_mode="absolute"),
        optax.scale_by_adam(b1=b1, b2=b2, eps=0.0, eps_root=eps),
        project_back(scale),
        optax.scale_by_learning_rate(learning_rate),
    )


def _published_projection(rank, update_interval, side, where, axes):
    return low_rank_project(
        rank=rank,
        update_interval=update_interval,
        side=side,
        method="svd",
        transition="keep",
        stagger=False,
        where=where,
        axes=axes,
    )


def _check(learning_rate, b1, b2, eps, weight_decay=0.0):
    check_rates(learning_rate, weight_decay)
    check_adam(b1, b2, eps)
