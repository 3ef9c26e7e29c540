"""LLaMAs in GGUF files: their configuration, and tensors in the order of the model."""

from collections.abc import Callable
from typing import Any

import numpy as np

from examples.common.errors import WeightsError
from examples.llama.model.config import ModelConfig
from examples.pretrained.gguf_file import Gguf
from examples.pretrained.tensors import Tensors

# Field to key, behind "llama.".
_KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hidden": ("embedding_length", int),
    "intermediate": ("feed_forward_length", int),
    "layers": ("block_count", int),
    "heads": ("attention.head_count", int),
    "max_length": ("context_length", int),
    "norm_eps": ("attention.layer_norm_rms_epsilon", lambda x: float(str(np.float32(x)))),
}
# What the model lacks, behind "llama.".
_NOT_HERE = (
    "expert_count",
    "attention.sliding_window",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def config_of(file: Gguf) -> ModelConfig:
    """The configuration that the metadata describe.

    Raises:
      WeightsError: if it is of another architecture, or needs what the model here lacks.
    """
    path, metadata = file.path, file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise WeightsError(
            f"{path}: unknown architecture: general.architecture must be 'llama', "
            f"got {architecture!r}"
        )
    missing = [f"llama.{key}" for key, _ in _KEYS.values() if f"llama.{key}" not in metadata]
    if _EMBEDDING not in file.stored:
        missing.append(_EMBEDDING)
    if missing:
        raise WeightsError(f"{path}: {', '.join(missing)} is missing")
    try:
        values = {field: make(metadata[f"llama.{key}"]) for field, (key, make) in _KEYS.items()}
        config = ModelConfig(
            **values,
            vocab_size=int(file.stored[_EMBEDDING].shape[-1]),
            kv_heads=int(metadata.get("llama.attention.head_count_kv", values["heads"])),
            rope_theta=float(metadata.get("llama.rope.freq_base", 10_000.0)),
            tied_embeddings=_HEAD not in file.stored,
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from error
    scaling = metadata.get("llama.rope.scaling.type", "none")
    turned = metadata.get("llama.rope.dimension_count", config.head_dim)
    if scaling != "none" or turned != config.head_dim:
        raise WeightsError(
            f"{path}: llama.rope.scaling.type must be 'none', got {scaling!r}; "
            f"llama.rope.dimension_count must be {config.head_dim}, got {turned}"
        )
    others = [f"llama.{key}" for key in _NOT_HERE if metadata.get(f"llama.{key}")]
    if others:
        raise WeightsError(f"{path}: {', '.join(others)} must be 0 or absent")
    return config


def tensors_of(file: Gguf, config: ModelConfig) -> Tensors:
    """All tensors in float32, with the rows of queries and keys in the order of the model."""
    heads = {"attn_q.weight": config.heads, "attn_k.weight": config.kv_heads}
    tensors = file.tensors()
    for name, tensor in tensors.items():
        count = heads.get(name.split(".", 2)[-1])
        if count is not None and len(tensor) % (2 * count) == 0:
            tensors[name] = unpermute(tensor, count)
    return tensors


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a GGUF's queries or keys (heads · H, in), as pairs (i, i + H/2) are turned.

    In GGUF files of this architecture rows 2i and 2i + 1 of a head are turned together.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
