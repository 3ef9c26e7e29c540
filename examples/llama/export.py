"""Weights of a run in the Hugging Face layout: `python -m examples.llama.export --help`."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from examples.common import cli
from examples.common.accelerators import announce_devices
from examples.common.config import path_of
from examples.common.errors import ConfigError
from examples.common.reporter import READING, on_stderr
from examples.llama.model.llama import with_params
from examples.llama.weights.files import PretrainedLlama, open_weights, read_params, replace_llama
from examples.llama.weights.runs import EXPORT, is_run


@dataclass(frozen=True)
class ExportConfig:
    """Write a directory in the Hugging Face layout that transformers and --init-from load.

    Adapters are merged, factorised weights multiplied out, weights in 8 bits decoded.
    """

    run: Annotated[str, tyro.conf.Positional]
    """The directory of a run; or other weights that `examples.llama.sample` takes."""
    step: int | None = None
    """The step of the checkpoint; the newest one by default."""
    to: Path | None = None
    """The directory to write; for a run by default RUN/export. An older export is replaced."""


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.exit_code(lambda: run(cli.parse(ExportConfig, "examples.llama.export", argv)))


def run(config: ExportConfig) -> int:
    """Export, and print where to."""
    path = path_of(config.run)
    if config.to is None and not is_run(path):
        raise ConfigError(
            f"{config.run}: not a directory of a run with checkpoints, in which the export would "
            "be: pass --to"
        )
    directory = path / EXPORT if config.to is None else config.to
    announce_devices()
    with on_stderr().during(READING):
        export(config.run, directory, config.step)
    print(directory)
    return 0


def export(name: str, directory: Path, step: int | None = None) -> None:
    """Write the weights called `name`, of a run those of one checkpoint, to a directory.

    Raises:
      WeightsError: if the weights cannot be read, or the directory has other files.
      CheckpointError: if the checkpoint is damaged.
    """
    file = open_weights(name, step)
    config, tensors = file.config, file.tensors()
    if {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}:
        config = dataclasses.replace(config, param_dtype="bfloat16")
    params = read_params(file._replace(tensors=lambda: tensors), config)
    replace_llama(
        PretrainedLlama(
            with_params(config, params), config, file.tokenizer, file.chat_template, file.end_ids
        ),
        directory,
    )


if __name__ == "__main__":
    sys.exit(main())
