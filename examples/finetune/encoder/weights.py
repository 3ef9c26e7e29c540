"""Models in the Hugging Face layout: read into parameters, and written back."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer

from examples.common.config import write_json
from examples.common.errors import WeightsError
from examples.finetune.encoder.config import EncoderConfig, classifier_config, read_config
from examples.finetune.encoder.data.rows import Unit
from examples.finetune.encoder.model import make_model
from examples.pretrained import Stored, fill, read_tensors, tensors_of, write_tensors
from examples.pretrained.hf_tokenizer import SETTINGS, TOKENIZER, write_settings

# transformers reads the first by the others, which a model may lack.
_TOKENIZER_FILES = (TOKENIZER, SETTINGS, "special_tokens_map.json")
FILES = ("config.json", *_TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json")

Params = dict[str, Any]

_MODULES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.attention.query": "encoder.layer.{i}.attention.self.query",
    "layers.attention.key": "encoder.layer.{i}.attention.self.key",
    "layers.attention.value": "encoder.layer.{i}.attention.self.value",
    "layers.attention.output": "encoder.layer.{i}.attention.output.dense",
    "layers.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers.mlp.intermediate": "encoder.layer.{i}.intermediate.dense",
    "layers.mlp.output": "encoder.layer.{i}.output.dense",
    "layers.mlp_norm": "encoder.layer.{i}.output.LayerNorm",
}
# The linear maps of the layers.
MATRICES = tuple(name for name in _MODULES if name.startswith("layers.") and "norm" not in name)
_HEADS = {
    "bert": {"head.dense": "bert.pooler.dense", "head.out": "classifier"},
    "roberta": {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"},
}
_TOKENS = {
    "bert": {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"},
    "roberta": {"unk": "<unk>", "cls": "<s>", "sep": "</s>", "pad": "<pad>"},
}
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

_NEW_HEAD = "pass --new-head for other classes"
_LABELS = Unit()


class Pretrained(NamedTuple):
    """A model from files."""

    directory: Path
    config: EncoderConfig
    raw_config: dict[str, Any]  # All of its config.json.
    params: Params
    new: tuple[str, ...]  # Tensors of the head that the files lack: they have first values.
    unused: tuple[str, ...]  # Tensors that belong to another head.


def module_name(module: str, architecture: str) -> str:
    """The name of a module in PyTorch: ``layers.attention.query`` is
    ``bert.encoder.layer.{i}.attention.self.query``."""
    heads = _HEADS[architecture]
    return heads[module] if module in heads else f"{architecture}.{_MODULES[module]}"


def stored_as(params: dict[tuple[str, ...], Any], config: EncoderConfig) -> dict[Any, Stored]:
    """Names of the tensors of all parameters, which are a flat dict."""
    found = {}
    for path in params:
        name = f"{module_name('.'.join(path[:-1]), config.architecture)}.{_LEAVES[path[-1]]}"
        stacked = path[0] == "layers"
        names = tuple(name.format(i=i) for i in range(config.layers)) if stacked else (name,)
        found[path] = Stored(names, stacked, transposed=path[-1] == "kernel")
    return found


def load_model(
    directory: Path,
    outputs: int,
    seed: int,
    *,
    labels: tuple[str, ...] = (),
    unit: Unit = _LABELS,
    new_head: bool = False,
) -> Pretrained:
    """Reads a model; what of its head is missing, or all of it with `new_head`, is random.

    A head whose classes the files name is put into the order of `labels`, that of a regression into
    `unit`.

    Raises:
      WeightsError: for a missing or damaged file, an unknown architecture, a head for classes of
        other names than `labels`, and a report of all tensors of the encoder that are missing and
        all that have another shape.
    """
    config, raw = read_config(directory, outputs)
    expected: dict[Any, Any] = flatten_dict(make_model(config)[1])
    head = [path for path in expected if path[0] == "head"]
    stored = stored_as(expected, config)
    tensors = _renamed(read_tensors(directory), config.architecture)
    if new_head:
        names = {name for path in head for name in stored[path].names}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in names}
    filled = fill(expected, stored, tensors, optional=head, remedy=_NEW_HEAD, source=str(directory))
    params = filled.params
    out = [path for path in head if path[1] == "out" and path in params]
    if out and labels:
        order = _class_order(raw, labels, directory / "config.json")
        params |= {path: params[path][..., order] for path in out}
    mean, size = unit
    for path in out:
        params[path] = (params[path] - (mean if path[-1] == "bias" else 0.0)) / size
    for path, key in zip(head, jax.random.split(jax.random.key(seed), len(head)), strict=True):
        if path not in params:
            params[path] = _first_value(path, expected[path], config, key)
    return Pretrained(directory, config, raw, unflatten_dict(params), filled.new, filled.unused)


def _class_order(raw: dict[str, Any], labels: tuple[str, ...], path: Path) -> np.ndarray:
    """Place of each class in the head, by the names in config.json."""
    found = raw.get("id2label")
    found = found if isinstance(found, dict) else {}
    names = [str(found.get(str(i), f"LABEL_{i}")) for i in range(len(labels))]
    if all(name.removeprefix("LABEL_") == str(i) for i, name in enumerate(names)):
        names = [name.removeprefix("LABEL_") for name in names]
        if sorted(names) != sorted(labels):
            return np.arange(len(labels))  # Numbers say nothing about the classes.
    stored, wanted = ([text.casefold() for text in texts] for texts in (names, labels))
    if len(set(stored)) < len(stored):  # Names that differ in their capitals alone.
        stored, wanted = names, list(labels)
    if sorted(stored) != sorted(wanted):
        raise WeightsError(
            f"{path}: id2label must name the classes {', '.join(labels)}, got {', '.join(names)}: "
            + _NEW_HEAD
        )
    return np.array([stored.index(name) for name in wanted])


def save_model(
    params: Params,
    config: EncoderConfig,
    raw_config: dict[str, Any],
    labels: tuple[str, ...],
    unit: Unit,
    source: Path,
    directory: Path,
) -> None:
    """Writes config, weights and the tokenizer of the directory `source`, to be read by this
    program and by transformers. The numbers of a regression are those of the labels."""
    directory.mkdir(parents=True, exist_ok=True)
    flat: dict[Any, Any] = flatten_dict(params)
    mean, size = unit
    for path in (path for path in flat if path[:2] == ("head", "out")):
        flat[path] = size * flat[path] + (mean if path[-1] == "bias" else 0.0)
    write_tensors(tensors_of(flat, stored_as(flat, config)), directory)
    write_json(directory / "config.json", classifier_config(config, raw_config, labels))
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
    if not (source / SETTINGS).exists():
        write_settings(_tokenizer_settings(config, source), directory)


def _tokenizer_settings(config: EncoderConfig, source: Path) -> dict[str, Any]:
    vocabulary = Tokenizer.from_file(str(source / TOKENIZER)).get_vocab()
    tokens = {f"{k}_token": v for k, v in _TOKENS[config.architecture].items() if v in vocabulary}
    types = ["token_type_ids"] if config.token_types > 1 else []
    inputs = ["input_ids", *types, "attention_mask"]
    return {"model_max_length": config.max_length, "model_input_names": inputs, **tokens}


def _renamed(tensors: dict[str, Any], architecture: str) -> dict[str, Any]:
    """With the names of a model that has a head.

    A model without one has no prefix; weights converted from TensorFlow have norms with gamma and
    beta; buffers are no weights.
    """
    renamed = {}
    for name, tensor in tensors.items():
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        new = new.replace("LayerNorm.beta", "LayerNorm.bias")
        if new.startswith(("embeddings.", "encoder.", "pooler.")):
            new = f"{architecture}.{new}"
        if new in renamed:
            raise WeightsError(f"{name} is there twice, under an old and a new name")
        if not new.endswith((".position_ids", ".token_type_ids")):
            renamed[new] = tensor
    return renamed


def _first_value(
    path: tuple[str, ...], like: jax.ShapeDtypeStruct, config: EncoderConfig, key: jax.Array
) -> jax.Array:
    if path[-1] == "bias":
        return jnp.zeros(like.shape, like.dtype)
    return config.init_std * jax.random.normal(key, like.shape, like.dtype)
