"""The default of ``natural_galore_adamw`` put together from its parts, to exchange one of them."""

from typing import Any

import optax

from examples.common.composed import composed_adamw
from examples.common.optimizers import with_unprojected_ratio


def recipe(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    update_interval: int = 200,
    seed: int = 0,
    method: Any = "power",
    nesterov: bool = True,
    history: int | None = None,
    damping: float = 0.03,
    damping_mode: Any = "relative",
    cautious: bool = True,
    scale: float = 1.0,
    residual: Any = "fisher",
    singular_limit: float | None = 0.2,
    singular_values: int = 1,
    unprojected_ratio: float = 4.0,
) -> optax.GradientTransformation:
    """Everything is as in ``natural_galore_adamw`` unless an argument says otherwise.

    Args:
      learning_rate, rank, update_interval, seed, unprojected_ratio: see there.
      method: of the projection.
      nesterov: whether Adam has Nesterov's momentum, in the subspace and on unprojected parameters.
      history: that many stored gradients before Adam instead of the compact Fisher matrix after it.
      damping, damping_mode: of either Fisher matrix.
      cautious: whether the compact Fisher matrix leaves out updates against the gradient.
      scale, residual: of the way back.
      singular_limit, singular_values: of the leading singular values of the update, and their
        number; a limit of None: not clipped.
    """
    fisher: dict[str, Any] = {"damping": damping, "damping_mode": damping_mode}
    if history is None:
        fisher |= {"decay": 0.97, "exponent": -0.5, "structure": "diagonal", "cautious": cautious}
    else:
        fisher["history"] = history
    tx = composed_adamw(
        "compact" if history is None else "stored",
        learning_rate,
        optax.scale_by_adam(nesterov=nesterov),
        rank=rank,
        update_interval=update_interval,
        method=method,
        transition="rotate",
        seed=seed,
        scale=scale,
        residual=residual,
        norm_growth_limit=1.01,
        singular_limit=singular_limit,
        singular_values=singular_values,
        **fisher,
    )
    return with_unprojected_ratio(tx, unprojected_ratio)
