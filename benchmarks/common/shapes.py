"""Shapes of LLaMA presets: all parameters, or the hidden matrices; random trees of shapes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from examples.llama.model.config import MODEL_PRESETS
from natgalore_jax._src.memory import llama_sizes
from natgalore_jax._src.memory.llama_sizes import LLAMA_RANKS as LLAMA_RANKS

Shapes = Mapping[str, tuple[int, ...]]
BF16 = 2  # bytes

if TYPE_CHECKING:
    PaperSize = str
else:  # The names that command lines offer.
    PaperSize = Literal[tuple(LLAMA_RANKS)]


def llama_shapes(size: str) -> Any:
    """The parameters of a preset in bfloat16, layers stacked, without their values."""
    config = MODEL_PRESETS[size]
    sizes = llama_sizes.LlamaSizes(
        *(getattr(config, name) for name in llama_sizes.LlamaSizes._fields)
    )
    return llama_sizes.llama_shapes(sizes, "bfloat16")


def hidden_shapes(preset: str, layers: int | None = None, stacked: bool = False) -> Shapes:
    """Seven matrices a layer, (in, out), each a leaf of its own or stacked with the other layers'.

    Args:
      preset: a name of ``examples.llama``.
      layers: as many of its layers; None is all.
      stacked: one leaf (layers, in, out) for each kind of matrix.
    """
    config = MODEL_PRESETS[preset]
    layers = layers or config.layers
    d, f, kv = config.hidden, config.intermediate, config.kv_heads * config.head_dim
    layer = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d)}
    layer |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
    if stacked:
        return {name: (layers, *shape) for name, shape in layer.items()}
    return {f"{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


def matrices(shapes: Shapes) -> list[tuple[int, int]]:
    """The sides of every matrix, those within a stack one by one."""
    return [(m, n) for *batch, m, n in shapes.values() for _ in range(batch[0] if batch else 1)]


def random_tree(shapes: Shapes, key: jax.Array, scale: float) -> dict[str, jax.Array]:
    """Independent normal float32 entries."""
    return {
        name: scale * jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }
