"""Weights in the checkpoints of runs, without the adapters and 8-bit codes that they train with."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

import natgalore_jax as ng
from examples.common.checkpoints import damage, kept, read_checkpoint, steps_done
from examples.common.config import Json
from examples.common.errors import CheckpointError, WeightsError
from examples.common.lora import Tree, partition, union
from examples.common.run_directory import CHECKPOINTS
from examples.llama.model.adapters import AdapterConfig, make_linear, without_adapters
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import abstract_params
from examples.pretrained import METHOD_MODEL

EXPORT = "export"
"""Directory of a finished run with its weights in the Hugging Face layout."""


class SavedRun(NamedTuple):
    """One checkpoint of a run."""

    path: Path
    number: int  # The name of the checkpoint.
    model: ModelConfig
    adapter: AdapterConfig
    weight_bits: int | None
    init_from: str | None


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run with checkpoints, not of a method with its model."""
    if not kept(path / CHECKPOINTS):
        return False
    return not (path / METHOD_MODEL).exists() or _describes_model(_newest_config(path))


def config_of(path: Path, number: int | None = None) -> dict[str, Any]:
    """The configuration in a checkpoint of a run, by default the newest.

    Raises:
      WeightsError: if it is no checkpoint of `examples.llama`.
    """
    config = _newest_config(path) if number is None else _config(path, number)
    if not _describes_model(config):
        raise WeightsError(
            f"{path}: no checkpoints of examples.llama; a method of examples.finetune has its "
            f"weights in {path / METHOD_MODEL}, which is not there yet"
        )
    return config


def _newest_config(path: Path) -> dict[str, Any]:
    return _config(path, kept(path / CHECKPOINTS)[-1])


def _config(path: Path, number: int) -> dict[str, Any]:
    return read_checkpoint(path / CHECKPOINTS, number)[0]


def _describes_model(config: dict[str, Any]) -> bool:
    """Whether a configuration is one of `examples.llama`: others have the name of a model."""
    return isinstance(config.get("model"), dict)


def saved_run(path: Path, step: int | None = None) -> SavedRun:
    """The newest checkpoint of a run, or the checkpoint after an optimizer step.

    Raises:
      WeightsError: if there is none of this step, or it is no checkpoint of `examples.llama`.
    """
    checkpoints = path / CHECKPOINTS
    by_step: dict[int | None, int] = {None: kept(checkpoints)[-1]}
    if step is not None:
        by_step = {done: n for n, (done, rest) in steps_done(checkpoints).items() if not rest}
    if step not in by_step:
        steps = ", ".join(map(str, by_step))
        raise WeightsError(f"{path}: no checkpoint of step {step}; there are those of {steps}")
    config = config_of(path, by_step[step])
    try:
        model, adapter = ModelConfig(**config["model"]), AdapterConfig(**config["adapter"])
    except (LookupError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: no checkpoints of examples.llama ({error!r})") from error
    more = config.get("weight_bits"), config.get("init_from")
    return SavedRun(path, by_step[step], model, adapter, *more)


def read_weights(run: SavedRun) -> Tree:
    """Weights of the model without adapters, in the layout and dtype of `run.model`.

    Raises:
      CheckpointError: if the checkpoint is damaged.
    """

    def like(_: Json) -> dict[str, Any]:
        weights = abstract_params(run.model, make_linear(run.adapter))
        params, frozen = partition(weights)
        if run.weight_bits is not None:
            params = jax.eval_shape(ng.training.quantize_weights, params)
        return {"params": params, "frozen": frozen}

    what = damage(run.path / CHECKPOINTS / str(run.number))
    if what is not None:
        raise CheckpointError(what)
    _, state = read_checkpoint(run.path / CHECKPOINTS, run.number, like)
    params = state["params"]
    if run.weight_bits is not None:
        params = ng.training.dequantize_weights(params, run.model.param_dtype)
    return without_adapters(run.adapter, union(params, state["frozen"]))
