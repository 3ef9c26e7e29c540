"""The next token from its logits."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Raises:
      ValueError: if a number is out of its range.
    """

    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's distribution, and less than 1 from a
    sharper one."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only; None is all of them."""
    top_p: float | None = None
    """Sample among the fewest tokens, likeliest first, whose probabilities sum to p, after the
    temperature and top_k; None is all of them."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or None, got {self.top_p}")


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Tokens (B,) int32 from logits (B, V)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.random.categorical(key, scaled).astype(jnp.int32)
    count = logits.shape[-1] if sampling.top_k is None else min(sampling.top_k, logits.shape[-1])
    likeliest, candidates = jax.lax.top_k(scaled, count)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(likeliest)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        likeliest = jnp.where(before < sampling.top_p, likeliest, -jnp.inf)
    choice = jax.random.categorical(key, likeliest)
    return jnp.take_along_axis(candidates, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
