"""LLaMA weights: read from runs, GGUF and Hugging Face files, and written to the latter."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer

from examples.common.config import write_json
from examples.common.errors import WeightsError
from examples.llama.data.tokenizer import for_prompts, load_tokenizer
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import Llama, abstract_params, with_params
from examples.llama.weights import hf_config, names, runs
from examples.pretrained import (
    fill,
    locate_model,
    model_of_method,
    read_tensors,
    tensors_of,
    write_tensors,
)
from examples.pretrained.chat import ChatTemplate
from examples.pretrained.hf_tokenizer import (
    SETTINGS,
    TOKENIZER,
    read_chat_template,
    read_tokenizer,
    stated_end,
    write_tokenizer,
)
from examples.pretrained.json_file import read_json
from examples.pretrained.locate import CONFIG
from examples.pretrained.tensors import Tensors

FILES = ("*.json", "*.jinja", "*.safetensors")
GENERATION = "generation_config.json"
# Of a model, whatever wrote it: stale beside the files of another one.
_OF_A_MODEL = (
    *(CONFIG, GENERATION, TOKENIZER, SETTINGS, "special_tokens_map.json", "chat_template.jinja"),
    *("model*.safetensors", "model*.safetensors.index.json"),
)

Params = dict[str, Any]


class WeightsFile(NamedTuple):
    """Description of a model in files; its tensors are read when `tensors` is called."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    end_ids: tuple[int, ...]  # Tokens that end an answer.
    tensors: Callable[[], Tensors]
    names: Mapping[str, str]  # What the file calls the parameters.
    types: Mapping[str, int]  # Of a GGUF: how many tensors are stored in which way.


class PretrainedLlama(NamedTuple):
    """A model with what it takes to talk to it."""

    model: Llama
    config: ModelConfig
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    end_ids: tuple[int, ...]  # Tokens that end an answer.


def load_llama(
    name: str,
    *,
    stacked: bool = False,
    dtype: str = "float32",
    param_dtype: str = "float32",
    step: int | None = None,
) -> PretrainedLlama:
    """A model from a run of `examples.llama`, a GGUF file, a directory in the Hugging Face layout,
    a package or a hub.

    Args:
      name: the directory of a run, or of a method that `examples.finetune.planner` has trained; a
        path ``model.gguf``; a directory with ``config.json``, ``model.safetensors`` (or its parts
        and their index) and, where there are any, ``tokenizer.json`` and ``tokenizer_config.json``;
        ``smollm2-135m-instruct``, for the pip package that brings it along; or a name on the
        Hugging Face hub.
      stacked: keep the layers in one stack, as `per_layer` training needs them.
      dtype: what products are computed in.
      param_dtype: what the weights become, whatever the file has.
      step: of a run, the step of the checkpoint; the newest one by default.

    Raises:
      WeightsError: names the file and the tensors at fault: missing, cut off or damaged files, an
        unknown architecture, and a report of all tensors that are missing or of another shape.
    """
    file = open_weights(name, step)
    config = dataclasses.replace(file.config, stacked=stacked, dtype=dtype, param_dtype=param_dtype)
    model = with_params(config, read_params(file, config))
    return PretrainedLlama(model, config, file.tokenizer, file.chat_template, file.end_ids)


def load_with_tokenizer(
    name: str, dtype: str, step: int | None = None
) -> tuple[PretrainedLlama, Tokenizer]:
    """:func:`load_llama` in one dtype, and the tokenizer.

    Raises:
      WeightsError: as :func:`load_llama`, and without a tokenizer.
    """
    loaded = load_llama(name, dtype=dtype, param_dtype=dtype, step=step)
    if loaded.tokenizer is None:
        raise WeightsError(f"{name}: no tokenizer.json")
    return loaded, loaded.tokenizer


def open_weights(name: str, step: int | None = None) -> WeightsFile:
    """Everything but the tensors. The tokenizer is for prompts: it adds no token after a text.

    Raises:
      WeightsError: as :func:`load_llama`.
    """
    path = locate_model(name, FILES)
    if runs.is_run(path):
        return _open_run(path, step)
    has_export = (path / runs.EXPORT / CONFIG).exists()
    path = path / runs.EXPORT if has_export else model_of_method(path)
    if step is not None:
        raise WeightsError(f"{name}: no checkpoints in this directory, so no step {step}")
    file = _open_gguf(path) if path.is_file() else _open_directory(path)
    if file.tokenizer is None:
        return file
    return file._replace(tokenizer=for_prompts(file.tokenizer, start=True))


def read_params(file: WeightsFile, config: ModelConfig) -> Params:
    """The parameters as a pure dict, in the layout and dtype of `config`.

    Raises:
      WeightsError: as :func:`load_llama`.
    """
    expected: dict[Any, Any] = flatten_dict(abstract_params(config))
    stored = names.stored_as(expected, config, file.names)
    filled = fill(expected, stored, file.tensors(), source=str(file.path))
    known = {file.names["head"]} if config.tied_embeddings else set()
    unknown = [n for n in filled.unused if n not in known and not n.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise WeightsError(
            f"{file.path}: {len(unknown)} tensors are no part of the model: {', '.join(unknown)}"
        )
    return unflatten_dict(filled.params)


def replace_llama(pretrained: PretrainedLlama, directory: Path) -> None:
    """:func:`save_llama` into a directory that appears with all its files, instead of an older one.

    Files that are no part of a model stay.

    Raises:
      WeightsError: if the directory has files, and not those of a model.
    """
    directory = directory.resolve()  # "." has no name.
    if directory.exists() and any(directory.iterdir()):
        path = directory / CONFIG
        if not path.exists() or read_json(path).get("model_type") != "llama":
            raise WeightsError(f"{directory}: not empty, and no exported model to be replaced")
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_llama(pretrained, unfinished)
    # Moved, then deleted: what a kill leaves of a directory would be refused as other files.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as aside:
        older = Path(aside) / directory.name
        if directory.exists():
            directory.rename(older)
        unfinished.rename(directory)
        for path in older.iterdir() if older.exists() else ():
            if not any(path.match(pattern) for pattern in _OF_A_MODEL):
                path.rename(directory / path.name)


def save_llama(pretrained: PretrainedLlama, directory: Path) -> None:
    """Writes `config.json`, `generation_config.json`, `model.safetensors` and the tokenizer, to be
    read by :func:`load_llama` and by transformers."""
    model, config, tokenizer, chat_template, end_ids = pretrained
    directory.mkdir(parents=True, exist_ok=True)
    flat: dict[Any, Any] = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    stored = names.stored_as(flat, config, names.HUGGING_FACE)
    write_tensors(tensors_of(flat, stored), directory)
    # Without an entry transformers takes ids of LLaMA's own tokenizer.
    end = None if not end_ids else end_ids[0] if len(end_ids) == 1 else list(end_ids)
    raw = hf_config.to_json(config) | {"bos_token_id": None, "eos_token_id": end}
    if tokenizer is not None:
        tokens = {"eos_token": str(tokenizer.id_to_token(end_ids[0]))} if end_ids else {}
        if chat_template is not None:
            tokens |= chat_template.tokens
        if "bos_token" in tokens:
            raw["bos_token_id"] = tokenizer.token_to_id(tokens["bos_token"])
        write_tokenizer(tokenizer, chat_template, tokens, directory)
    write_json(directory / CONFIG, raw)
    write_json(directory / GENERATION, {key: raw[key] for key in ("bos_token_id", "eos_token_id")})


def _open_run(path: Path, step: int | None) -> WeightsFile:
    run = runs.saved_run(path, step)
    tokenizer, end = load_tokenizer(str(path / TOKENIZER))

    def tensors() -> Tensors:
        flat: dict[Any, Any] = flatten_dict(runs.read_weights(run))
        return tensors_of(flat, names.stored_as(flat, run.model, names.HUGGING_FACE))

    return WeightsFile(
        path=path,
        config=run.model,
        tokenizer=for_prompts(tokenizer, start=run.init_from is not None),
        chat_template=None,
        end_ids=(end,),
        tensors=tensors,
        names=names.HUGGING_FACE,
        types={},
    )


def _open_directory(path: Path) -> WeightsFile:
    if not (path / CONFIG).exists():
        raise WeightsError(
            f"{path}: neither a run, which has {runs.CHECKPOINTS} or {runs.EXPORT}, nor a model in "
            f"the Hugging Face layout, which has {CONFIG}"
        )
    raw = read_json(path / CONFIG)
    if "preset" in raw and "model_type" not in raw:
        raise WeightsError(f"{path}: a run of examples.llama without checkpoints")
    config = hf_config.config_of(raw, path / CONFIG)
    generation = path / GENERATION
    settings = read_json(generation) if generation.exists() else {}
    # Null, which transformers writes for what was not set, says nothing.
    ends = [source.get("eos_token_id") for source in (settings, raw)]
    tokenizer = read_tokenizer(path)
    if tokenizer is not None:
        ends.append(stated_end(tokenizer, path))
    end = next((end for end in ends if end not in (None, [])), ())
    end_ids: tuple[int, ...] = tuple(end) if isinstance(end, list | tuple) else (end,)  # type: ignore[bad-assignment]
    # Left out of files where the embedding takes its place, but not always of their index.
    absent = {names.HUGGING_FACE["head"]} if config.tied_embeddings else set()
    return WeightsFile(
        path=path,
        config=config,
        tokenizer=tokenizer,
        chat_template=read_chat_template(path),
        end_ids=end_ids,
        tensors=lambda: read_tensors(path, absent),
        names=names.HUGGING_FACE,
        types={},
    )


def _open_gguf(path: Path) -> WeightsFile:
    try:
        from examples.llama.weights import gguf
        from examples.pretrained.gguf_file import open_gguf
        from examples.pretrained.gguf_tokenizer import gguf_tokenizer
    except ImportError as error:
        raise WeightsError(
            f"{path}: needs {error.name}: python -m pip install gguf jinja2"
        ) from error
    file = open_gguf(path)
    config = gguf.config_of(file)
    tokenizer = gguf_tokenizer(file.metadata, path)
    ids = {
        name: file.metadata[f"tokenizer.ggml.{name}_token_id"]
        for name in ("bos", "eos")
        if f"tokenizer.ggml.{name}_token_id" in file.metadata
    }
    text = file.metadata.get("tokenizer.chat_template")
    tokens = {f"{name}_token": str(tokenizer.id_to_token(int(i))) for name, i in ids.items()}
    return WeightsFile(
        path=path,
        config=config,
        tokenizer=tokenizer,
        chat_template=None if text is None else ChatTemplate(text, tokens),
        end_ids=(int(ids["eos"]),) if "eos" in ids else (),
        tensors=lambda: gguf.tensors_of(file, config),
        names=names.GGUF,
        types=file.types,
    )
