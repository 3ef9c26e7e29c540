"""Arguments of a factory that are static during training."""

import inspect
from collections.abc import Callable
from typing import Any

# Arguments that shape the state or the compiled program, and callables that
# optax.inject_hyperparams would call as schedules.
_STRUCTURAL = frozenset(
    {
        "rank",
        "update_interval",
        "side",
        "method",
        "transition",
        "stagger",
        "where",
        "axes",
        "basis_dtype",
        "seed",
        "history",
        "damping_mode",
        "history_dtype",
        "residual",
        "structure",
        "modes",
        "exponent",
        "granularity",
        "leading",
        "norm",
        "iterations",
        "head",
        "error_feedback",
        "cautious",
        "nesterov",
        "factored",
        # Decays: optax.inject_hyperparams would round 0.999 to 1 for bfloat16 parameters.
        "b1",
        "b2",
        "b3",
        "rho",
        "momentum",
        "decay",
        "residual_decay",
        "mu_dtype",
        "moment_bits",
        "block_size",
        "min_size",
        "singular_values",
        "mask",
    }
)


def structural_args(factory: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments of a factory that shape its state or its program: ``static_args`` for Optax.

    ``optax.inject_hyperparams`` turns every number among the arguments into an array of the state
    and every callable into a schedule. A rank, an interval or a history length must stay a Python
    number, and ``where``, ``axes`` and ``mask`` are not schedules. All other arguments
    (``learning_rate``, ``damping``, ``scale``, ``weight_decay``, ``eps``, ``norm_growth_limit``,
    ...) can be injected, as a number that is changed in the state or as a schedule.

    Decays (``b1``, ``b2``, ``rho``, ``residual_decay``, ...) are among the names, because injected
    arrays have the dtype of the parameters: in bfloat16 0.999 is 1, and a moment never changes. To
    inject a decay, remove its name from ``static_args`` and set ``hyperparam_dtype=jnp.float32``.
    Set that for 16-bit parameters in any case: in float16 an ``eps`` of 1e-8 is 0, in bfloat16 a
    ``norm_growth_limit`` of 1.01 is 1.0078, and one of 1.003 is 1.
    ``b3`` of Alice must stay: the state of zero has one array less.

    Args:
      factory: :func:`natural_galore_adamw`, any other transformation of this library, or your own
        factory that takes arguments of these names.

    Returns:
      The names, in the order of the signature.

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> ng.structural_args(ng.woodbury_natural_gradient)
      ('history', 'damping_mode', 'history_dtype')
      >>> static = ng.structural_args(ng.natural_galore_adamw)
      >>> tx = optax.inject_hyperparams(ng.natural_galore_adamw, static_args=static)(1e-2, rank=2)
      >>> state = tx.init({"w": jnp.ones((6, 8))})
      >>> state.hyperparams["scale"] = jnp.float32(0.5)
    """
    return tuple(name for name in inspect.signature(factory).parameters if name in _STRUCTURAL)
