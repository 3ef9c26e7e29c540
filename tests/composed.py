"""AdamW in a subspace from the parts, with the defaults of the tests."""

from typing import Any

import optax

from examples.common import composed


def composed_adamw(
    fisher: composed.Fisher,
    learning_rate: optax.ScalarOrSchedule,
    rank: int | tuple[int, ...] = 128,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Stored gradients have an absolute damping of 1e-3 unless ``settings`` say otherwise."""
    if fisher == "stored":
        settings = {"damping": 1e-3, "damping_mode": "absolute"} | settings
    if fisher == "compact":
        settings["cautious"] = True
    adam = optax.scale_by_adam(eps=eps, mu_dtype=mu_dtype, nesterov=fisher == "compact")
    return composed.composed_adamw(fisher, learning_rate, adam, weight_decay, rank=rank, **settings)
