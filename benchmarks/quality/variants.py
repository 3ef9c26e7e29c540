"""The default of ``natural_galore_adamw`` put together from its parts, to exchange one of them."""

from typing import Any, Literal

import optax

import natgalore_jax as ng

INNER = {
    "adam": lambda: optax.scale_by_adam(nesterov=True),
    "lion": optax.scale_by_lion,
}


def recipe(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    update_interval: int,
    steps: int,
    seed: int = 0,
    inner: Literal["adam", "lion"] = "adam",
    structure: str = "diagonal",
    exponent: float = -0.5,
    damping: float = 0.03,
    last_damping: float | None = None,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Everything is as in ``natural_galore_adamw`` unless it is said.

    ``unprojected_ratio`` is not among the parts.

    Args:
      learning_rate, rank, update_interval, seed, weight_decay, mask: see there.
      steps: of the run.
      inner: what runs in the subspace, and on what is not projected.
      structure, exponent: of the compact Fisher matrix.
      damping: relative to it, in the first step.
      last_damping: in the last one; between them it changes by the same factor in every step. None:
        the same as the first.
    """
    schedule: Any = damping
    if last_damping is not None:
        schedule = optax.exponential_decay(damping, steps, last_damping / damping)
    return ng.chain(
        ng.low_rank_project(rank, update_interval, transition="rotate", seed=seed),
        ng.compact_natural_gradient(
            INNER[inner](), damping=schedule, exponent=exponent, structure=structure, cautious=True
        ),
        ng.project_back(residual="fisher", residual_scale=0.4),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
