"""Checkpoints: the train state, where the data is, and the configuration."""

from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from examples.llama.train_config import ConfigError, differences
from examples.llama.train_step import TrainState

Json = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, by micro-step.

    Saving happens in the background. A checkpoint gets its name when it is complete, so that one
    that was cut off is never seen.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest(self) -> int | None:
        """Micro-step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def resume_point(self, identity: Json, run_dir: Path, *, resume: bool) -> int:
        """Micro-step that a run in `run_dir` starts from, having checked that it may.

        Raises:
          ConfigError: if there are checkpoints and the run is not to be resumed, or they were made
            with another identity: the configuration and what else must be equal.
        """
        latest = self.latest()
        if latest is None:
            return 0
        if not resume:
            raise ConfigError(
                f"{run_dir} already has checkpoints: pass --resume to continue that run, "
                "--name for another one, or --overwrite to delete it"
            )
        changed = differences(self.config(), identity)
        if changed:
            raise ConfigError(
                f"{run_dir} was made with another configuration: " + ", ".join(changed)
            )
        return latest

    def save(self, state: TrainState, data: Json, config: Json) -> None:
        micro_step = int(state.micro_step)
        if micro_step == self.latest():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config),
        )
        self._manager.save(micro_step, args=items)

    def config(self) -> Json:
        """The configuration that the newest checkpoint was made with."""
        items = ocp.args.Composite(config=ocp.args.JsonRestore())
        return self._manager.restore(self.latest(), args=items)["config"]

    def restore(self, like: TrainState) -> tuple[TrainState, Json]:
        """State and data position of the newest checkpoint, placed as `like` is."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(self.latest(), args=items)
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits until what is being saved is saved."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
