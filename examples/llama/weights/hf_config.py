"""`config.json` of LLaMAs in the Hugging Face layout, read and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.common.errors import WeightsError
from examples.llama.model.config import ModelConfig

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
# Keys of relatives of LLaMA that change what is computed, with the values that do not.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    **{key: (value,) for key, value in _ONLY.items()},
    "hidden_activation": ("silu",),
    **dict.fromkeys(
        (
            "bias",
            "use_bias",
            "qkv_bias",
            "qk_norm",
            "use_qk_norm",
            "qk_layernorm",
            "rope_interleaved",
            "is_decoder",
            "add_cross_attention",
            "parallel_attn",
            "use_parallel_residual",
            "attn_temperature_tuning",
        ),
        (False,),
    ),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_percent"), (1,)),
    **dict.fromkeys(
        (
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
            "logit_scale",
            "scale_emb",
        ),
        (1,),
    ),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout"),
        (0,),
    ),
    **dict.fromkeys(("num_experts", "num_local_experts"), (0,)),
    **dict.fromkeys(
        (
            "sliding_window",
            "attention_multiplier",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "logit_softcapping",
            "clip_qkv",
            "scale_depth",
            "no_rope_layers",
            "no_rope_layer_interval",
            "rope_local_base_freq",
            "quantization_config",
        ),
        (),
    ),
}


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
        f"{key} must be {_one_of(values)}, got {raw[key]!r}"
        for key, values in _WITHOUT_EFFECT.items()
        if raw.get(key) is not None and raw[key] not in values and not _is_off(key, raw)
    ]
    others = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
    if others:
        problems.append(f"layer_types must be 'full_attention', got {', '.join(map(repr, others))}")
    rope, found = _rotations(raw)
    problems += found
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
            rope_theta=rope,
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _is_off(key: str, raw: Mapping[str, Any]) -> bool:
    return key == "sliding_window" and raw.get("use_sliding_window") is False


def _one_of(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values)) or "null"


def _rotations(raw: Mapping[str, Any]) -> tuple[float, list[str]]:
    """The base of the rotations, and what else the file says about them."""
    problems, bases = [], []
    # transformers 5 has the first, older versions the second, which is null for plain LLaMAs.
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name) or {}
        if not isinstance(rope, Mapping):
            problems.append(f"{name} must be an object, got {rope!r}")
            continue
        by_type = sorted(key for key, value in rope.items() if isinstance(value, Mapping))
        if by_type:
            problems.append(f"{name} must be those of all layers, got some of {', '.join(by_type)}")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            problems.append(f"rope_type must be 'default', got {kind!r}")
        if rope.get("partial_rotary_factor") not in (None, 1):
            problems.append(
                f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']!r}"
            )
        bases.append(rope.get("rope_theta"))
    stated = [base for base in (*bases, raw.get("rope_theta")) if base is not None] or [10_000.0]
    if any(base != stated[0] for base in stated):
        problems.append(f"rope_theta must be one number, got {', '.join(map(repr, stated))}")
    try:
        return float(stated[0]), problems
    except (TypeError, ValueError):
        return 0.0, [*problems, f"rope_theta must be a number, got {stated[0]!r}"]


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
