"""AdamW in a subspace, from the parts: for settings that no ready-made optimizer has."""

from typing import Any, Literal

import optax

import natgalore_jax as ng

PROJECT = [
    "update_interval",
    "side",
    "method",
    "transition",
    "stagger",
    "where",
    "axes",
    "basis_dtype",
    "seed",
]
STORED = ["history", "damping", "damping_mode", "history_dtype"]
COMPACT = ["decay"]
BACK = ["scale", "residual", "residual_scale", "norm_growth_limit"]


def composed_adamw(
    inner: Literal["adam", "stored", "compact"],
    learning_rate: optax.ScalarOrSchedule,
    rank: int | tuple[int, ...] = 128,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Arguments of the parts by name.

    Args:
      inner: GaLore's Adam, Natural GaLore's stored gradients before it (with an absolute damping of
        1e-3 unless ``settings`` say otherwise), or the compact Fisher matrix after it.
    """

    def take(names):
        return {name: settings.pop(name) for name in names if name in settings}

    if inner == "stored":
        settings = {"damping": 1e-3, "damping_mode": "absolute"} | settings
        parts = (
            ng.woodbury_natural_gradient(**take(STORED)),
            optax.scale_by_adam(eps=eps, mu_dtype=mu_dtype),
        )
    elif inner == "compact":
        adam = optax.scale_by_adam(eps=eps, mu_dtype=mu_dtype, nesterov=True)
        parts = (ng.compact_natural_gradient(adam, **take(COMPACT), cautious=True),)
    else:
        parts = (optax.scale_by_adam(eps=eps, mu_dtype=mu_dtype),)
    tx = ng.chain(
        ng.low_rank_project(rank, **take(PROJECT)),
        *parts,
        ng.project_back(**take(BACK)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    assert not settings, f"arguments of no part: {settings}"
    return tx
