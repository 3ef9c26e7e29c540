"""Weight decay and learning rate after a transformation, as in ``optax.adamw``."""

from typing import Any

import optax

from natgalore_jax._src.params.checks import check_rates


def descent(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """``W ← W − η (U + ω W)`` with U of ``tx``."""
    check_rates(learning_rate, weight_decay)
    return optax.chain(
        tx,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
