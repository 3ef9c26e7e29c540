"""Metrics for TensorBoard and Weights & Biases, beside the JSON lines of a run."""

import importlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from examples.common.config import Json
from examples.common.errors import ConfigError, with_type

LoggerName = Literal["tensorboard", "wandb"]
WANDB_ID = "wandb_id.txt"


class Logger(Protocol):
    """Receives every record of the metrics."""

    def rewind(self, step: int) -> None:
        """Later steps are run again, or for the first time. Called before the first record."""

    def write(self, record: Json) -> None: ...

    def close(self, failed: bool) -> None:
        """Nothing comes after it; `failed` if the run diverged or ended with an error."""


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raise a ConfigError if the package of a logger is missing."""
    for name in names:
        _package(name)


def make_loggers(names: Sequence[LoggerName], run_dir: Path, config: Json) -> list[Logger]:
    """The loggers of a run.

    Raises:
      ConfigError: if the package of one is missing, or Weights & Biases does not start.
    """
    return [_LOGGERS[name](run_dir, config) for name in names]


def scalars(record: Json) -> dict[str, float]:
    """The numbers of a record by name, as "train/loss"; those of its metrics too."""
    numbers = {**record, **record.get("metrics", {})}
    return {
        f"{record['kind']}/{name}": value
        for name, value in numbers.items()
        if isinstance(value, (int, float)) and name != "step"
    }


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, config: Json):
        self._package = _package("tensorboard")
        self._directory = str(run_dir / "tensorboard")
        self._writer: Any = None
        self._files = 0

    def rewind(self, step: int) -> None:
        if self._writer is not None:
            self._writer.close()
        # What was recorded of steps that are run again is not shown. Files of one second have
        # one name but for their suffix.
        self._files += 1
        self._writer = self._package.SummaryWriter(
            self._directory,
            purge_step=step + 1 if step else 0,
            filename_suffix=f".{self._files}",
        )

    def write(self, record: Json) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    """A run of Weights & Biases; WANDB_PROJECT and WANDB_MODE=offline act as always."""

    def __init__(self, run_dir: Path, config: Json):
        package = _package("wandb")
        path = run_dir / WANDB_ID
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        try:
            self._run = package.init(
                project=os.environ.get("WANDB_PROJECT", "natgalore-jax"),
                name=run_dir.name,
                id=path.read_text(encoding="utf-8"),
                resume="allow",
                dir=run_dir,
                config=config,
            )
        # No login, no network and others, of several types: the message is what counts.
        except Exception as error:
            raise ConfigError(f"--log-to wandb: it cannot start ({with_type(error)})") from error
        # Its own counter refuses steps that are run again after a rollback or a resume.
        self._run.define_metric("*", step_metric="step")

    def rewind(self, step: int) -> None:
        """Steps that are run again are drawn a second time."""

    def write(self, record: Json) -> None:
        self._run.log({**scalars(record), "step": record["step"]})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


_PACKAGES: dict[LoggerName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_LOGGERS: dict[LoggerName, Callable[[Path, Json], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}


def _package(option: LoggerName) -> Any:
    name = _PACKAGES[option]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--log-to {option} needs the package {name} ({error}): python -m pip install {name}"
        ) from error
