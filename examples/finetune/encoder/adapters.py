"""LoRA on a model that was read from files: W0 + alpha / rank · A B in the place of W0.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Kernels are (in, out), so
that A is (in, r) and B is (r, out). A starts random and B as zeros: the model is that of the files.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from examples.finetune.encoder.config import EncoderConfig
from examples.finetune.encoder.model import Apply, MakeLinear, dense, make_model
from examples.llama.model.adapters import init_a
from examples.llama.model.llama import on_rows

Params = dict[str, Any]


class LoRALinear(nnx.Module):
    """x W0 + b + scale · x A B, on the layer of Flax."""

    def __init__(
        self,
        rank: int,
        scale: float,
        inputs: int,
        outputs: int,
        config: EncoderConfig,
        rngs: nnx.Rngs,
    ):
        self.scale = scale
        self.base = dense(inputs, outputs, config, rngs)
        self.lora = nnx.LoRA(inputs, rank, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.scale * on_rows(self.lora, x)


def add_adapters(
    params: Params,
    config: EncoderConfig,
    modules: Collection[str],
    *,
    rank: int,
    scale: float,
    seed: int,
) -> tuple[Apply, Params]:
    """A model with adapters beside these modules (``layers.attention.query``), and its parameters.

    What the model has been is under ``base``.
    """
    apply, expected = make_model(config, _make_linear(modules, rank, scale))
    plain, weights = flatten_dict(params), {}
    shapes: dict[Any, Any] = flatten_dict(expected)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    for (path, like), key in zip(shapes.items(), keys, strict=True):
        if path[-1] == "lora_a":
            weights[path] = init_a(key, like.shape, like.dtype)
        elif path[-1] == "lora_b":
            weights[path] = jnp.zeros(like.shape, like.dtype)
        else:
            weights[path] = plain[tuple(part for part in path if part != "base")]
    return apply, unflatten_dict(weights)


def merge_adapters(weights: Params, scale: float) -> Params:
    """Parameters of the plain model that gives the same outputs."""
    flat: dict[Any, Any] = flatten_dict(weights)
    merged = {}
    for path, leaf in flat.items():
        if path[-2:] == ("base", "kernel"):
            A, B = (flat[(*path[:-2], "lora", name)] for name in ("lora_a", "lora_b"))
            leaf = leaf + scale * (A @ B)
        if "lora" not in path:
            merged[tuple(part for part in path if part != "base")] = leaf
    return unflatten_dict(merged)


def is_adapter(path: tuple[str, ...]) -> bool:
    return "lora" in path


def _make_linear(modules: Collection[str], rank: int, scale: float) -> MakeLinear:
    def make(
        name: str, inputs: int, outputs: int, config: EncoderConfig, rngs: nnx.Rngs
    ) -> nnx.Module:
        if f"layers.{name}" in modules:
            return LoRALinear(rank, scale, inputs, outputs, config, rngs)
        return dense(inputs, outputs, config, rngs)

    return make
