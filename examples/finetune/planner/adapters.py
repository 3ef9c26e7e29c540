"""LoRA on a LLaMA that was read from files, and back to a LLaMA without it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from examples.llama.model.adapters import AdapterConfig, init_a, make_linear
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import Llama

Params = dict[str, Any]
GraphDef = Any


def abstract(config: ModelConfig, adapter: AdapterConfig) -> tuple[GraphDef, Params]:
    """A model as NNX takes it apart, of which nothing is allocated."""

    def make():
        return Llama(config, rngs=nnx.Rngs(0, adapter=1), make_linear=make_linear(adapter))

    model = nnx.eval_shape(make)
    return nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))


def add_adapters(params: Params, like: Params, seed: int) -> Params:
    """All weights of a model with adapters, `like` its shapes: A random, B zero."""
    given: dict[Any, Any] = flatten_dict(params)
    shapes: dict[Any, Any] = flatten_dict(like)
    weights: dict[Any, Any] = {}
    for i, (path, leaf) in enumerate(shapes.items()):
        if path[-1] == "lora_a":
            key = jax.random.fold_in(jax.random.key(seed), i)
            weights[path] = init_a(key, leaf.shape, leaf.dtype)
        elif path[-1] == "lora_b":
            weights[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            weights[path] = given[tuple(part for part in path if part != "base")]
    return unflatten_dict(weights)


@functools.partial(jax.jit, static_argnames="scale")
def merge_adapters(weights: Params, scale: float) -> Params:
    """Weights of the model without adapters that gives the same outputs."""
    flat: dict[Any, Any] = flatten_dict(weights)
    merged = {}
    for path, leaf in flat.items():
        if path[-2:] == ("base", "kernel"):
            A, B = (flat[(*path[:-2], "lora", name)] for name in ("lora_a", "lora_b"))
            leaf = leaf + scale * jnp.matmul(A, B, precision="highest")
        if "lora" not in path:
            merged[tuple(part for part in path if part != "base")] = leaf
    return unflatten_dict(merged)
