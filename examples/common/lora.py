"""Linear layers, LoRA beside them, and weights split into trained and frozen ones.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. The paper writes
W0 + alpha / rank · B A for weights (out, in). Kernels here are (in, out), so the same product is
``lora_a (in, r) @ lora_b (r, out)``. A starts random and B as zeros: a model with new adapters
computes what it did without them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[Any, Any]


def by_rows(x: jax.Array) -> jax.Array:
    """Activations sharded by rows over the devices of `jax.set_mesh`, if there are any.

    Where weights are sharded too, this has the compiler gather those of one layer at a time. Left
    alone it may shard products instead, and communicate activations many times in a layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_auto:  # Within `jax.shard_map` rows are sharded.
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(mesh.axis_names))


def on_rows(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A layer on rows of one long axis: XLA's CPU backend is slower on more axes."""
    y = by_rows(layer(by_rows(x.reshape(-1, x.shape[-1]))))
    return y.reshape(*x.shape[:-1], -1)


class Linear(nnx.Linear):
    """`nnx.Linear` on rows."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return on_rows(super().__call__, inputs)


class LoRALinear(nnx.Module):
    """A linear layer with an adapter, base(x) + scale · x A B; `nnx.LoRALinear` has no scale."""

    def __init__(self, base: nnx.Linear, rank: int, scale: float, rngs: nnx.Rngs):
        self.scale = scale
        self.base = base
        self.lora = nnx.LoRA(
            base.in_features,
            rank,
            base.out_features,
            dtype=base.dtype,
            param_dtype=base.param_dtype,
            a_initializer=init_a,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.scale * on_rows(self.lora, x)


def init_a(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Initial A, (..., in, r): uniform, with variance 2 / in, as in `nnx.LoRA`."""
    batch = tuple(range(len(shape) - 2))
    return nnx.initializers.he_uniform(batch_axis=batch)(key, shape, dtype)


def add_adapters(params: Tree, like: Tree, seed: int) -> Tree:
    """Weights of a model with adapters: A random, B zero, all others from `params`.

    Args:
      params: of the model without adapters.
      like: shapes of the model with adapters, whose frozen layers are called ``base``.
      seed: of A.
    """
    given: Tree = flatten_dict(params)
    shapes: Tree = flatten_dict(like)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    weights: Tree = {}
    for (path, leaf), key in zip(shapes.items(), keys, strict=True):
        if path[-1] == "lora_a":
            weights[path] = init_a(key, leaf.shape, leaf.dtype)
        elif path[-1] == "lora_b":
            weights[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            weights[path] = given[_without_base(path)]
    return unflatten_dict(weights)


@functools.partial(jax.jit, static_argnames="scale")
def merge_adapters(weights: Tree, scale: float) -> Tree:
    """Weights of the model without adapters that computes the same outputs."""
    flat: Tree = flatten_dict(weights)
    merged = {}
    for path, leaf in flat.items():
        if path[-2:] == ("base", "kernel"):
            a, b = adapter_of(path)
            leaf = with_product(leaf, flat[a], flat[b], scale)
        if not is_adapter(path):
            merged[_without_base(path)] = leaf
    return unflatten_dict(merged)


def with_product(W0: jax.Array, A: jax.Array, B: jax.Array, scale: float) -> jax.Array:
    """W0 + scale · A B in the dtype of W0, computed in float32."""
    A, B = A.astype(jnp.float32), B.astype(jnp.float32)
    product = jnp.matmul(A, B, precision="highest")
    return (W0.astype(jnp.float32) + scale * product).astype(W0.dtype)


def adapter_of(kernel: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Paths of A and B beside the frozen kernel at a path."""
    return [(*kernel[:-2], "lora", name) for name in ("lora_a", "lora_b")]


def is_adapter(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at this path is an A or a B."""
    return "lora" in path


def partition(
    weights: Tree, is_trained: Callable[[tuple[Any, ...]], bool] = lambda path: "base" not in path
) -> tuple[Tree, Tree]:
    """Nested weights as (trained, frozen); by default the base of every LoRA is frozen.

    Without LoRA nothing is frozen, and the second is empty.
    """
    flat = flatten_dict(weights)
    trained = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten_dict(trained), unflatten_dict(frozen)


def union(trained: Tree, frozen: Tree) -> Tree:
    """All weights: the inverse of :func:`partition`."""
    if not frozen:
        return trained
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)})


def _without_base(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part for part in path if part != "base")
