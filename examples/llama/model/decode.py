"""Forward pass of LLaMA over new tokens, with a cache of keys and values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import Layer, Llama, attention


class KVCache(NamedTuple):
    """Of one layer; of a stack of layers, with a leading axis L. Slots S are in order of time."""

    k: jax.Array  # (B, K, S, H)
    v: jax.Array  # (B, K, S, H)


Caches = KVCache | tuple[KVCache, ...]


def empty_caches(config: ModelConfig, rows: int, slots: int) -> Caches:
    """For all layers: one stack for stacked layers, a tuple otherwise."""
    shape = (rows, config.kv_heads, slots, config.head_dim)
    dtype = jnp.dtype(config.dtype)
    if config.stacked:
        stack = (config.layers, *shape)
        return KVCache(jnp.zeros(stack, dtype), jnp.zeros(stack, dtype))
    return tuple(
        KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)
    )


def slots_of(caches: Caches) -> int:
    """Number of slots."""
    return (caches if isinstance(caches, KVCache) else caches[0]).k.shape[-2]


def append(cache: KVCache, k: jax.Array, v: jax.Array, slot: jax.Array | int) -> KVCache:
    """With k and v (B, T, K, H) of new tokens in the slots from `slot` on."""
    return KVCache(
        *(
            jax.lax.dynamic_update_slice_in_dim(
                old, jnp.swapaxes(new, 1, 2).astype(old.dtype), slot, axis=2
            )
            for old, new in zip(cache, (k, v), strict=True)
        )
    )


def extend(
    model: Llama, tokens: jax.Array, starts: jax.Array, caches: Caches, slot: jax.Array | int
) -> tuple[jax.Array, Caches]:
    """New tokens of each row to what comes out of the last layer, (B, T, D).

    ``model.logits`` of it are the logits of the whole rows, at the new tokens.

    Args:
      model: the model.
      tokens: (B, T) int32, for the slots from `slot` on. Rows end together: shorter ones begin
        later, and what stands before their start is never looked at.
      starts: (B,) int32, the slot of each row's first token.
      caches: what was kept of the slots before.
      slot: how many slots are taken.
    """
    slots = slot + jnp.arange(tokens.shape[1])  # (T,)
    positions = jnp.maximum(slots - starts[:, None], 0)  # (B, T)
    keys = jnp.arange(slots_of(caches))  # (S,)
    visible = (keys <= slots[:, None]) & (keys >= starts[:, None, None])  # (B, T, S)

    def run(x: jax.Array, layer: Layer, cache: KVCache) -> tuple[jax.Array, KVCache]:
        q, k, v = layer.attention.project(layer.attention_norm(x), positions)
        cache = append(cache, k, v, slot)
        x = x + layer.attention.output(attention(q, *cache, visible))
        return x + layer.mlp(layer.mlp_norm(x)), cache

    x = model.embed(tokens)
    if isinstance(caches, KVCache):
        if not isinstance(model.layers, Layer):
            raise ValueError("the caches are of stacked layers, and the model's are not")
        return jax.lax.scan(lambda x, both: run(x, *both), x, (model.layers, caches))
    if isinstance(model.layers, Layer):
        raise ValueError("the model's layers are stacked, and the caches are not")
    new = []
    for layer, cache in zip(model.layers, caches, strict=True):
        x, cache = run(x, layer, cache)
        new.append(cache)
    return x, tuple(new)
