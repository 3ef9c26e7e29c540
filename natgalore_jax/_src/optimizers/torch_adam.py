"""AdamW of Hugging Face's transformers, which the published GaLore codes copied.

Two differences from ``optax.adamw`` exceed rounding. ε is added to √v before the bias correction,
so that at step t it acts as ε / √(1 − β₂ᵗ), initially thirty times larger. Weight decay acts on the
new weight, after the step.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.kernel import own_arithmetic


def scale_by_transformers_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """``(m / (1 − β₁ᵗ)) · √(1 − β₂ᵗ) / (√v + ε)``."""

    def init_fn(params):
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params),
            nu=optax.tree.zeros_like(params),
        )

    @own_arithmetic
    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(
            lambda m, v: (correction * m / (jnp.sqrt(v) + eps)).astype(m.dtype), mu, nu
        )
        return updates, optax.ScaleByAdamState(
            count, optax.tree.cast_like(mu, state.mu), optax.tree.cast_like(nu, state.nu)
        )

    return optax.GradientTransformation(init_fn, update_fn)


@own_arithmetic
def _decayed(rate: jax.typing.ArrayLike, updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda u, w: u - (rate * (w + u)).astype(u.dtype), updates, params)


def decay_after_step(
    learning_rate: optax.ScalarOrSchedule, weight_decay: optax.ScalarOrSchedule, mask: Any = None
) -> optax.GradientTransformation:
    """``W + U ↦ (1 − η ω) (W + U)``: the last member of a chain."""

    def init_fn(params):
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
        eta, omega = (x(state.count) if callable(x) else x for x in (learning_rate, weight_decay))
        updates = _decayed(eta * omega, updates, params)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    tx = optax.GradientTransformation(init_fn, update_fn)
    return optax.masked(tx, mask) if mask is not None else tx
