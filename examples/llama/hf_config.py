"""`config.json` of LLaMAs in the Hugging Face layout, read and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.llama.config import ModelConfig
from examples.pretrained import WeightsError

# Field to key.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
}
# What transformers takes for granted where the file does not say, and no other value is known here.
_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def config_of(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """The configuration that a `config.json` describes.

    Raises:
      WeightsError: if it is of another architecture, or needs what the model here lacks.
    """
    if raw.get("model_type") != "llama":
        raise WeightsError(
            f"{path}: unknown architecture: model_type must be 'llama', "
            f"got {raw.get('model_type')!r}"
        )
    missing = [key for key in _KEYS.values() if key not in raw]
    if missing:
        raise WeightsError(f"{path}: {', '.join(missing)} is missing")
    problems = [
        f"{key} must be {value!r}, got {raw[key]!r}"
        for key, value in _ONLY.items()
        if raw.get(key, value) != value
    ]
    # transformers 5 has the first, older versions the second, which is null for plain LLaMAs.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type must be 'default', got {kind!r}")
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim * raw["num_attention_heads"] != raw["hidden_size"]:
        problems.append(
            f"head_dim must be hidden_size / num_attention_heads = {raw['hidden_size']} / "
            f"{raw['num_attention_heads']}, got {head_dim}"
        )
    if problems:
        raise WeightsError(f"{path}: {'; '.join(problems)}")
    heads = raw["num_attention_heads"]
    try:
        return ModelConfig(
            **{field: raw[key] for field, key in _KEYS.items()},
            kv_heads=raw.get("num_key_value_heads") or heads,
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from error


def to_json(config: ModelConfig) -> dict[str, Any]:
    """What `config_of` and transformers, 4 and 5, read as this configuration."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, field) for field, key in _KEYS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "dtype": config.param_dtype,
        "torch_dtype": config.param_dtype,
        **_ONLY,
    }
