"""Runs that start from published weights: what these decide, and what must not contradict them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from examples.common.checkpoints import kept
from examples.common.errors import CheckpointError, ConfigError, DataError, WeightsError
from examples.common.run_directory import CHECKPOINTS, check_apart
from examples.llama.data.tokenizer import (
    TextTokenizer,
    load_tokenizer,
    plain_text,
    vocabulary_size,
)
from examples.llama.model.config import ModelConfig
from examples.llama.run_config import RunConfig, check_adapter, run_preset
from examples.llama.weights.files import Params, WeightsFile, open_weights, read_params
from examples.pretrained.hf_tokenizer import TOKENIZER

# What the weights leave open.
_FREE = ("stacked", "remat", "dtype", "param_dtype", "max_length")


class Start(NamedTuple):
    """Configuration, tokenizer and weights at the start of a run."""

    config: RunConfig  # With the model that the weights are for.
    tokenizer: TextTokenizer
    weights: Callable[[], Params]  # Reads them; a run that is resumed never calls it.
    note: str  # Where model and tokenizer are from, and whether the weights were rounded.


def start_from(config: RunConfig) -> Start:
    """The run of `config` from the weights that `config.init_from` names.

    A run that is resumed takes model and tokenizer from its own directory.

    Raises:
      ConfigError: if the weights cannot be used, or an option contradicts them.
    """
    run_dir = config.run_dir
    saved = run_dir / "config.json", run_dir / TOKENIZER
    # Without a checkpoint the run starts anew, perhaps from other weights than before.
    goes_on = config.output.resume and kept(run_dir / CHECKPOINTS)
    if goes_on and all(path.exists() for path in saved):
        model = _saved_model(saved[0])
        tokenizer = load_tokenizer(str(saved[1]))
        note = f"model and tokenizer from {run_dir}"
    else:
        if config.output.overwrite:
            check_apart(run_dir, "--init-from", str(config.init_from))
        file = _using(open_weights, config.init_from)
        model, tokenizer = file.config, _tokenizer(config, file)
        types = ", ".join(f"{count} {name}" for name, count in file.types.items())
        note = f"weights from {file.path}" + (f", stored as {types}" if types else "")
    model = merge(config, model)
    config = dataclasses.replace(config, model=model)

    def weights() -> Params:
        return _using(lambda name: read_params(open_weights(name), model), config.init_from)

    return Start(config, tokenizer, weights, note)


def overlay(weights: Params, given: Params) -> Params:
    """First weights of a model with those that are given in their place; adapters stay as they are.

    Raises:
      ConfigError: if some of those given have no place, because weights are factorised.
    """
    flat, given = flatten_dict(weights), flatten_dict(given)
    # The matrix beside an adapter has one more part in its path.
    places = {tuple(part for part in path if part != "base"): path for path in flat}
    homeless = given.keys() - places.keys()
    if homeless:
        raise ConfigError(
            "weights of low rank cannot start from published ones: use --adapter.kind none, lora "
            f"or relora; there is no place for {'.'.join(map(str, min(homeless, key=str)))}"
        )
    return unflatten_dict(flat | {places[path]: array for path, array in given.items()})


def _saved_model(path: Path) -> ModelConfig:
    try:
        return ModelConfig(**json.loads(path.read_text(encoding="utf-8"))["model"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: not the configuration of a run ({error!r})") from error


def merge(config: RunConfig, model: ModelConfig) -> ModelConfig:
    """The model of the weights, laid out and computed as `config` says.

    Raises:
      ConfigError: if an option contradicts the weights.
    """
    preset, given = run_preset(config.preset).model, config.model
    changed = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(given)
        if getattr(given, field.name) != getattr(preset, field.name)
    }
    conflicts = [
        f"model.{name}={value}, and the weights have {getattr(model, name)}"
        for name, value in changed.items()
        if name not in _FREE and value != getattr(model, name)
    ]
    if changed.get("max_length", 0) > model.max_length:
        conflicts.append(
            f"model.max_length={given.max_length}, and the weights were trained up to "
            f"{model.max_length}"
        )
    if config.data.vocab_size != run_preset(config.preset).data.vocab_size:
        conflicts.append("vocab_size is of a tokenizer to train, and the weights come with one")
    length = changed.get("max_length", model.max_length)
    if config.seq_len > length:
        conflicts.append(f"seq_len={config.seq_len} is longer than max_length={length}")
    if conflicts:
        raise ConfigError(f"--init-from {config.init_from}: {'; '.join(conflicts)}")
    check_adapter(config.adapter, model)
    free = {name: getattr(given, name) for name in _FREE} | {"max_length": length}
    return dataclasses.replace(model, **free)


def _tokenizer(config: RunConfig, file: WeightsFile) -> TextTokenizer:
    """That of the weights, or the one that is given, which must be the same."""
    name, own = config.data.tokenizer, file.tokenizer
    given = load_tokenizer(name, file.end_ids) if name else None
    if given is not None:
        tokenizer = given
    elif own is not None:
        tokenizer = _using(lambda path: plain_text(own, path, file.end_ids), str(file.path))
    else:
        raise ConfigError(f"{file.path}: no tokenizer: pass the one of the weights, --tokenizer")
    if given is not None and own is not None:
        ids = [t.get_vocab(with_added_tokens=True) for t in (given.tokenizer, own)]
        other = sorted(t for t in ids[0].keys() | ids[1].keys() if ids[0].get(t) != ids[1].get(t))
        if other:
            raise ConfigError(
                f"{config.data.tokenizer}: {len(other)} tokens are not those of the tokenizer of "
                f"{file.path}, such as {other[0]!r}: leave --tokenizer out"
            )
    size = vocabulary_size(tokenizer.tokenizer)
    if size > file.config.vocab_size:
        raise ConfigError(
            f"{config.data.tokenizer or file.path}: a tokenizer of {size} tokens, and weights for "
            f"{file.config.vocab_size}"
        )
    return tokenizer


def _using(function: Callable[[str], Any], name: str | None) -> Any:
    try:
        return function(str(name))
    except (CheckpointError, DataError, WeightsError) as error:
        raise ConfigError(str(error)) from error
