"""The default of ``natural_galore_adamw`` put together from its parts, to exchange one of them."""

from typing import Any, Literal

import optax

import natgalore_jax as ng
from examples.common.composed import composed_adamw
from examples.common.optimizers import with_unprojected_ratio

INNER = {
    "adam": optax.scale_by_adam,
    "lion": lambda nesterov: optax.scale_by_lion(),
    "adam8": lambda nesterov: ng.scale_by_adam_8bit(nesterov=nesterov),
    "lean": lambda nesterov: ng.scale_by_adam_8bit(nesterov=nesterov, min_size=256, factored=True),
}


def recipe(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    update_interval: int = 200,
    steps: int = 0,
    seed: int = 0,
    side: Any = "short",
    method: Any = "power",
    transition: Any = "rotate",
    stagger: bool | None = None,
    basis_dtype: Any = None,
    inner: Literal["adam", "lion", "adam8", "lean"] = "adam",
    nesterov: bool = True,
    history: int | None = None,
    structure: str = "diagonal",
    exponent: float = -0.5,
    fisher_decay: float = 0.97,
    damping: float = 0.03,
    last_damping: float | None = None,
    damping_mode: Any = "relative",
    cautious: bool = True,
    scale: float = 1.0,
    residual: Any = "fisher",
    residual_scale: float | None = None,
    residual_decay: float | None = None,
    norm_growth_limit: float | None = 1.01,
    singular_limit: float | None = 0.2,
    unprojected_ratio: float = 4.0,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Everything is as in ``natural_galore_adamw`` unless an argument says otherwise.

    Args:
      learning_rate, rank, update_interval, seed, unprojected_ratio, weight_decay, mask: see there.
      steps: of the run.
      side, method, transition, stagger, basis_dtype: of the projection.
      inner, nesterov: what runs in the subspace, and on unprojected parameters.
      history: that many stored gradients before ``inner`` instead of the compact Fisher matrix
        after it.
      structure, exponent, fisher_decay, cautious: of the compact Fisher matrix.
      damping, damping_mode: of the Fisher matrix, in the first step.
      last_damping: in the last one; between them it changes by the same factor in every step. None:
        the same as the first.
      scale, residual, residual_scale, residual_decay, norm_growth_limit: of the way back.
      singular_limit: of the leading singular value of the update; None: not clipped.
    """
    schedule: Any = damping
    if last_damping is not None:
        schedule = optax.exponential_decay(damping, steps, last_damping / damping)
    adam = INNER[inner](nesterov=nesterov)
    fisher: dict[str, Any] = {"damping": schedule, "damping_mode": damping_mode}
    if history is None:
        fisher |= {"decay": fisher_decay, "exponent": exponent, "structure": structure}
        fisher["cautious"] = cautious
    else:
        fisher["history"] = history
    tx = composed_adamw(
        "compact" if history is None else "stored",
        learning_rate,
        adam,
        weight_decay,
        mask,
        rank=rank,
        update_interval=update_interval,
        side=side,
        method=method,
        transition=transition,
        stagger=stagger,
        basis_dtype=basis_dtype,
        seed=seed,
        scale=scale,
        residual=residual,
        norm_growth_limit=norm_growth_limit,
        residual_scale=residual_scale,
        residual_decay=residual_decay,
        singular_limit=singular_limit,
        **fisher,
    )
    return with_unprojected_ratio(tx, unprojected_ratio)
