"""Continue a prompt, one token after the other."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("length", "temperature", "top_k"))
def generate(
    model: Callable[[jax.Array], jax.Array],
    prompt_ids: jax.Array,
    length: int,
    temperature: float,
    top_k: int | None,
    key: jax.Array,
) -> jax.Array:
    """Prompts (B, T0) continued by ``length`` tokens: (B, T0 + length) int32.

    Every new token costs a forward pass over the whole row, whose shape never changes; what the
    model has yet to write comes later in the row, and a causal model does not look there.

    Args:
      model: from tokens (B, T) to logits (B, T, V); any callable that is also a pytree, such as
        a ``Llama``, or ``jax.tree_util.Partial(apply, params)`` for a pure function.
      prompt_ids: at least one token in each row.
      length: how many tokens to add.
      temperature: 0 takes the likeliest token; 1 samples from the model's distribution, and less
        than 1 from a sharper one.
      top_k: sample among the k likeliest tokens only; None is all of them.
      key: a random key.
    """
    rows, start = prompt_ids.shape
    if start < 1:
        raise ValueError("a prompt needs at least one token")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None, got {top_k}")

    def write_token(i, ids):
        logits = model(ids)[:, i - 1]
        if temperature == 0:
            token = jnp.argmax(logits, axis=-1)
        else:
            k = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
            likeliest, candidates = jax.lax.top_k(logits, k)
            choice = jax.random.categorical(jax.random.fold_in(key, i), likeliest / temperature)
            token = jnp.take_along_axis(candidates, choice[:, None], axis=-1)[:, 0]
        return ids.at[:, i].set(token.astype(ids.dtype))

    blank = jnp.zeros((rows, length), jnp.int32)
    ids = jnp.concatenate([prompt_ids.astype(jnp.int32), blank], axis=1)
    return jax.lax.fori_loop(start, start + length, write_token, ids)
