"""What files call the parameters of the model."""

from collections.abc import Iterable, Mapping
from typing import Any

from examples.llama.model.config import ModelConfig
from examples.pretrained import Stored

# Modules to names; {i} is the number of the layer.
HUGGING_FACE = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.attention_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.attention.q": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.attention.k": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.attention.v": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.attention.o": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.mlp.gate": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.mlp.up": "model.layers.{i}.mlp.up_proj.weight",
    "layers.mlp.down": "model.layers.{i}.mlp.down_proj.weight",
}
GGUF = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "layers.attention_norm": "blk.{i}.attn_norm.weight",
    "layers.attention.q": "blk.{i}.attn_q.weight",
    "layers.attention.k": "blk.{i}.attn_k.weight",
    "layers.attention.v": "blk.{i}.attn_v.weight",
    "layers.attention.o": "blk.{i}.attn_output.weight",
    "layers.mlp_norm": "blk.{i}.ffn_norm.weight",
    "layers.mlp.gate": "blk.{i}.ffn_gate.weight",
    "layers.mlp.up": "blk.{i}.ffn_up.weight",
    "layers.mlp.down": "blk.{i}.ffn_down.weight",
}


def stored_as(
    paths: Iterable[tuple[Any, ...]], config: ModelConfig, names: Mapping[str, str]
) -> dict[tuple[Any, ...], Stored]:
    """Where each parameter stands: paths are those of a flat dict, with the numbers of layers
    unless they are stacked."""
    found = {}
    for path in paths:
        *module, leaf = (part for part in path if not isinstance(part, int))
        name = names[".".join(module)]
        numbers = [part for part in path if isinstance(part, int)]
        stacked = path[0] == "layers" and not numbers
        layers = range(config.layers) if stacked else numbers or [0]
        found[path] = Stored(
            tuple(name.format(i=i) for i in layers), stacked, transposed=leaf == "kernel"
        )
    return found
