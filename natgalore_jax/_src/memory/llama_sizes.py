"""Sizes and parameter shapes of the LLaMA models of the GaLore papers."""

from typing import Any, NamedTuple

import jax


class LlamaSizes(NamedTuple):
    """Sizes for the presets of ``ModelConfig`` in ``examples/llama``, with its names."""

    vocab_size: int
    hidden: int  # width of the residual stream
    intermediate: int  # width inside the feed-forward network
    layers: int
    heads: int
    kv_heads: int


LLAMA_SIZES = {
    "60m": LlamaSizes(32_000, 512, 1376, 8, 8, 8),
    "130m": LlamaSizes(32_000, 768, 2048, 12, 12, 12),
    "350m": LlamaSizes(32_000, 1024, 2736, 24, 16, 16),
    "1b": LlamaSizes(32_000, 2048, 5461, 24, 32, 32),
    "7b": LlamaSizes(32_000, 4096, 11008, 32, 32, 32),
}
# Ranks of GaLore's experiments.
LLAMA_RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}


def llama_shapes(sizes: LlamaSizes, dtype: str) -> dict[str, Any]:
    """Shapes of the tree of parameters, with the layers in one stack."""
    hidden, inner, vocab = sizes.hidden, sizes.intermediate, sizes.vocab_size
    kv = hidden // sizes.heads * sizes.kv_heads

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def kernel(inputs, outputs):
        return {"kernel": array(sizes.layers, inputs, outputs)}

    return {
        "embed": {"embedding": array(vocab, hidden)},
        "layers": {
            "attention_norm": {"scale": array(sizes.layers, hidden)},
            "attention": {
                "q": kernel(hidden, hidden),
                "k": kernel(hidden, kv),
                "v": kernel(hidden, kv),
                "o": kernel(hidden, hidden),
            },
            "mlp_norm": {"scale": array(sizes.layers, hidden)},
            "mlp": {
                "gate": kernel(hidden, inner),
                "up": kernel(hidden, inner),
                "down": kernel(inner, hidden),
            },
        },
        "norm": {"scale": array(hidden)},
        "head": {"kernel": array(hidden, vocab)},
    }
