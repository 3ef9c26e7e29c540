"""Sizes of the models, checked when they are made."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from natgalore_jax._src.memory.llama_sizes import LLAMA_SIZES, LlamaSizes

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A LLaMA: its sizes, and how it is laid out and computed.

    Raises:
      ValueError: if a size is not positive, or sizes do not fit one another.
    """

    vocab_size: int
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width inside the feed-forward network."""
    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values; fewer than heads is grouped-query attention."""
    max_length: int
    """The most tokens in a row."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    """Use the embedding as the output head too."""
    stacked: bool = False
    """Keep the layers in one stack, (layers, ...) in every parameter, and scan over it."""
    remat: bool = False
    """Recompute what is inside a layer in the backward pass, instead of keeping it."""
    dtype: str = "float32"
    """Dtype of matrix products: float32 or bfloat16."""
    param_dtype: str = "float32"
    """Dtype of parameters: float32 or bfloat16."""

    def __post_init__(self) -> None:
        for name in (*LlamaSizes._fields, "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} must be one of {DTYPES}, got {getattr(self, name)!r}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not a multiple of heads={self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"rotary embeddings turn pairs, so hidden / heads must be even, got "
                f"{self.hidden} / {self.heads} = {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def smallest_side(self) -> int:
        """Of the matrices inside the layers: the highest rank that all of them can have."""
        return min(self.hidden, self.intermediate, self.kv_heads * self.head_dim)


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters."""
    c = config
    attention = 2 * c.hidden * c.head_dim * (c.heads + c.kv_heads)
    mlp = 3 * c.hidden * c.intermediate
    norms = 2 * c.hidden
    tables = c.vocab_size * c.hidden * (1 if c.tied_embeddings else 2)
    return tables + c.layers * (attention + mlp + norms) + c.hidden


MODEL_PRESETS: dict[str, ModelConfig] = {
    # For two cores, with a vocabulary trained on the text itself.
    "nano": ModelConfig(
        vocab_size=1024, hidden=128, intermediate=352, layers=4, heads=4, kv_heads=4, max_length=128
    ),
    "9m": ModelConfig(
        vocab_size=8192, hidden=256, intermediate=688, layers=6, heads=4, kv_heads=4, max_length=256
    ),
    # The models of the GaLore papers, on rows of 256 tokens.
    **{name: ModelConfig(**s._asdict(), max_length=256) for name, s in LLAMA_SIZES.items()},
    # The published SmolLM2-135M, for its weights.
    "smollm2-135m": ModelConfig(
        vocab_size=49_152,
        hidden=576,
        intermediate=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        max_length=8192,
        rope_theta=100_000.0,
        norm_eps=1e-5,
        tied_embeddings=True,
    ),
}

if TYPE_CHECKING:
    PresetName = str
else:  # The names that command lines offer.
    PresetName = Literal[tuple(MODEL_PRESETS)]
