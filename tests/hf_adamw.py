"""AdamW as HuggingFace wrote it and galore-torch and Natural GaLore's code copied it.

It differs from optax.adamw in two places: ε is added to √v before the bias correction, so that at
step t it acts as ε/√(1 − β₂ᵗ), thirty times larger at first; and the weight decay comes after the
step and shrinks the new weight. Over sixty steps both exceed the tolerances of the parity tests.
"""

import jax
import jax.numpy as jnp
import optax


def scale_by_hf_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """``(m / c₁) / ((√v + ε) / √c₂)`` with ``cᵢ = 1 − βᵢᵗ``."""

    def init(params):
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, updates)
        factor = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: factor * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def decay_after_step(rate: float) -> optax.GradientTransformation:
    """``W + U ↦ (1 − rate) (W + U)``: the last member of a chain, rate = learning rate × decay."""

    def update(updates, params):
        return jax.tree.map(lambda u, p: u - rate * (p + u), updates, params)

    return optax.stateless(update)
