"""Tiny LLaMAs of transformers as files: weights and logits of make_llama_logits.py."""

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from examples.llama.model.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=64, hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, max_length=64
)
# What make_llama_logits.py gives to transformers.
CASES = {
    "multi_head": dataclasses.replace(SMALL, kv_heads=4),
    "grouped_query": dataclasses.replace(SMALL, rope_theta=100_000.0, norm_eps=1e-5),
    "tied": dataclasses.replace(
        SMALL, kv_heads=1, rope_theta=500.0, norm_eps=1e-2, tied_embeddings=True
    ),
}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "llama_logits.npz"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
WORDS = ["</s>", *(f"w{i}" for i in range(1, 60))]


def arrays(case: str) -> dict[str, np.ndarray]:
    """tokens, logits, and weights/NAME of a case."""
    with np.load(FIXTURE) as file:
        return {k.removeprefix(f"{case}/"): file[k] for k in file.files if k.startswith(f"{case}/")}


def weights(case: str) -> dict[str, np.ndarray]:
    found = arrays(case).items()
    return {k.removeprefix("weights/"): v for k, v in found if k.startswith("weights/")}


def tokenizer() -> Tokenizer:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def config_json(case: str) -> dict:
    """As transformers 4 writes it."""
    config = CASES[case]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "eos_token_id": 0,
    }


def write_directory(directory: Path, case: str = "grouped_query", tensors=None, **changes) -> Path:
    """The Hugging Face layout; `changes` are to its config.json."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(case) | changes))
    tensors = weights(case) if tensors is None else tensors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(path: Path, case: str = "grouped_query", tensors=None, **changes) -> Path:
    """As llama.cpp's converter writes it, in float32; `changes` are to the metadata."""
    config = CASES[case]
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.intermediate)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(changes.pop("turned", config.head_dim))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.pop("pre", "smollm"))
    writer.add_token_list(["<|end|>", *string.ascii_letters, *"01234567", "he", "ll", "hell"])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * 63])
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    assert not changes
    heads = {"self_attn.q_proj": config.heads, "self_attn.k_proj": config.kv_heads}
    for name, tensor in (weights(case) if tensors is None else tensors).items():
        for part, count in heads.items():
            if part in name:
                halves = tensor.reshape(count, 2, -1, tensor.shape[-1])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        for part, new in _GGUF_NAMES.items():
            name = name.replace(part, new)
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of an unstacked model, as a pure dict, in the layout of a stacked one."""
    layers = [params["layers"][i] for i in sorted(params["layers"])]
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
