"""Weights of low rank: factorised weights, LoRA on frozen weights, and ReLoRA.

Every matrix inside the layers is replaced; embeddings, norms and the head stay as they are, and are
trained.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from examples.common.lora import LoRALinear, Tree, merge_adapters, on_rows
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import INIT_STD, MakeLinear, dense

# The kinds that an option has an effect with.
_KINDS = {
    "rank": ("factorised", "lora", "relora"),
    "alpha": ("lora", "relora"),
    "merge_every": ("relora",),
    "restart_warmup": ("relora",),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Weights of low rank, to compare with optimizer states of low rank.

    "factorised" trains W = B A from scratch. "lora" (Hu et al. 2021) trains B and A in
    W = W0 + alpha / rank · B A and keeps the first weights W0. "relora" (Lialin et al. 2023) also
    adds the product to W0 every so often and starts B and A anew, without the paper's first steps
    at full rank. Embeddings, norms and the head are trained in full.

    Raises:
      ValueError: if a number is out of its range.
    """

    kind: Literal["none", "factorised", "lora", "relora"] = "none"
    """Kind of the layers' matrices; "none" is matrices of full rank."""
    rank: int = 32
    """Columns of B and rows of A."""
    alpha: float = 32.0
    """LoRA, ReLoRA: the product is multiplied by alpha / rank."""
    merge_every: int = 200
    """ReLoRA: steps between two merges."""
    restart_warmup: int = 20
    """ReLoRA: steps that warm up the learning rate after a merge."""

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if self.kind not in kinds and value != defaults[name]:
                raise ValueError(
                    f"adapter.{name}={value} has no effect with adapter.kind={self.kind!r}, "
                    f"only with {' or '.join(kinds)}"
                )
        for name in ("rank", "merge_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"adapter.{name} must be at least 1, got {getattr(self, name)}")
        if not self.alpha > 0:
            raise ValueError(f"adapter.alpha must be positive, got {self.alpha}")
        if not 0 <= self.restart_warmup < self.merge_every:
            raise ValueError(
                f"adapter.restart_warmup must be at least 0 and below adapter.merge_every="
                f"{self.merge_every}, got {self.restart_warmup}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def merges_after(self, step: int) -> bool:
        """Whether the product is added to W0 once so many steps are done."""
        return self.kind == "relora" and step % self.merge_every == 0


class Factorised(nnx.LoRA):
    """x A B: a layer without a kernel."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return on_rows(super().__call__, x)


def make_linear(adapter: AdapterConfig) -> MakeLinear:
    """Factory of the linear maps of a model's layers."""
    if adapter.kind == "none":
        return dense
    make = _factorised if adapter.kind == "factorised" else _lora
    return functools.partial(make, adapter)


def _factorised(
    adapter: AdapterConfig, inputs: int, outputs: int, config: ModelConfig, rngs: nnx.Rngs
) -> Factorised:
    # A sum of r products, each of variance s⁴, has the variance r s⁴: that of a kernel.
    init = nnx.initializers.normal((INIT_STD**2 / adapter.rank) ** 0.25)
    return Factorised(
        inputs,
        adapter.rank,
        outputs,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        a_initializer=init,
        b_initializer=init,
        rngs=rngs,
    )


def _lora(
    adapter: AdapterConfig, inputs: int, outputs: int, config: ModelConfig, rngs: nnx.Rngs
) -> LoRALinear:
    base = dense(inputs, outputs, config, rngs)
    # A stream of its own for A: W0 is what a model without adapters starts from.
    return LoRALinear(base, adapter.rank, adapter.scale, nnx.Rngs(params=rngs.adapter()))


def without_adapters(adapter: AdapterConfig, weights: Tree) -> Tree:
    """Weights of the model without adapters: adapters merged, factorised weights multiplied out.

    Both models compute the same outputs, to rounding. Products are computed in float32.
    """
    if adapter.kind == "none":
        return weights
    if adapter.kind != "factorised":
        return merge_adapters(weights, adapter.scale)
    flat: Tree = flatten_dict(weights)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        A, B = (flat.pop((*path[:-1], name)) for name in ("lora_a", "lora_b"))
        product = jnp.matmul(
            A.astype(jnp.float32), B.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        flat[(*path[:-1], "kernel")] = product.astype(A.dtype)
    return unflatten_dict(flat)
