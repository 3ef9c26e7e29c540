"""Checkpoints: the train state, the position in the data and the configuration, with digests.

Digests notice what readers do not: a flipped bit within numbers.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from examples.common.config import Json, check_same, differences, refuse_unless_resumed
from examples.common.errors import CheckpointError, ConfigError, first_line
from examples.common.train_state import TrainState

_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run, by micro-step.

    Saving happens in the background. A checkpoint gets its name when it is complete, with the
    digests of its files, so that one that was cut off is never seen. Several processes save into
    the one directory that all of them see. What was saved on some devices is restored on others.
    """

    def __init__(self, directory: Path, *, keep: int = 2, keep_best: int = 0):
        """Keeps the last `keep`, and the `keep_best` of the lowest loss that `save` was told.

        Raises:
          ConfigError: if checkpoints in this directory could not be read.
        """
        check_directory(directory)
        self._directory = directory.absolute()
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            best_fn=_loss if keep_best else None,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    # The best come last, which is where it takes them from.
                    policies.BestN(
                        get_metric_fn=_loss,
                        reverse=True,
                        n=keep_best,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._before_naming),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._saving = False

    def _before_naming(self) -> None:
        # Called by the first process, when all of them have written their files. There is never
        # more than one save at a time.
        for unfinished in self._directory.glob(f"*{_UNFINISHED}*"):
            write_digests(unfinished)

    def latest(self) -> int | None:
        """Micro-step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Micro-step of the checkpoint with the lowest loss; without `keep_best` the newest."""
        return self._manager.best_step()

    def resume_point(
        self,
        identity: Json,
        run_dir: Path,
        *,
        resume: bool,
        note: Callable[[str], None],
        differences: Callable[[Json, Json], list[str]] = differences,
    ) -> int:
        """Micro-step that a run in `run_dir` starts from, having checked that it may.

        `note` is told if there is nothing to resume.

        Raises:
          ConfigError: if there are checkpoints and the run is not to be resumed, or they were made
            with another identity: the configuration and what else must be equal.
        """
        latest = self.latest()
        if latest is None:
            if resume:
                note(f"{run_dir} has no checkpoint yet: starting at the first step")
            return 0
        refuse_unless_resumed(run_dir, resume)
        check_same(run_dir, self.config(), identity, differences)
        return latest

    def save(
        self, state: TrainState, data: Json, config: Json, *, loss: float | None = None
    ) -> None:
        """Saves in the background, when the save before is done.

        Raises:
          CheckpointError: if this save cannot be started, or the one before was not completed.
        """
        micro_step = int(state.micro_step)
        if micro_step == self.latest():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config),
        )
        metrics = None if loss is None else {"loss": loss}
        try:
            is_saved = self._manager.save(micro_step, args=items, metrics=metrics)
        # OSError of a file, ValueError of TensorStore, and others: what counts is that it failed.
        except Exception as error:
            raise self._failed(error) from error
        if not is_saved:  # Orbax takes the highest number for the newest.
            raise CheckpointError(
                f"{self._directory}: micro-step {micro_step} is before that of the newest "
                f"checkpoint, {self.latest()}"
            )
        self._saving = True

    def check(self) -> None:
        """Raises a CheckpointError if the save in the background has failed; waits for nothing."""
        # Its `check_for_errors` would take the error away from the thread that deletes older
        # checkpoints when there is none.
        if self._saving and not self._manager.is_saving_in_progress():
            self._wait()

    def _wait(self) -> None:
        self._saving = False
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        complete = kept(self._directory)
        left = f"the one of micro-step {max(complete)} is complete" if complete else "there is none"
        return CheckpointError(
            f"{self._directory}: a checkpoint could not be written ({first_line(error)}); {left}"
        )

    def config(self) -> Json:
        """The configuration that the newest checkpoint was made with."""
        items = ocp.args.Composite(config=ocp.args.JsonRestore())
        with _one_line(self._directory / str(self.latest())):
            return self._manager.restore(self.latest(), args=items)["config"]

    def restore(self, like: TrainState) -> tuple[TrainState, Json]:
        """State and data position of the newest checkpoint, placed as `like` is, which is deleted.

        There may be no room for both.

        Raises:
          CheckpointError: if the one that is being saved cannot be, or the newest cannot be read.
        """
        self._wait()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        jax.tree.map(lambda x: x.delete(), like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        with _one_line(self._directory / str(self.latest())):
            restored = self._manager.restore(self.latest(), args=items)
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits until what is being saved is saved.

        Raises:
          CheckpointError: if it could not be.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except CheckpointError:
            if kind is None:  # What went wrong first says more.
                raise


def check_directory(directory: Path) -> None:
    """Raise a ConfigError if checkpoints in this directory could not be read."""
    if "[" in str(directory.absolute()):  # Orbax takes it for a pattern, and merges nothing.
        raise ConfigError(
            f"{directory.absolute()}: Orbax writes no readable checkpoints below a directory with "
            "[ in its name: pass another --name or --root"
        )


@contextlib.contextmanager
def _one_line(checkpoint: Path) -> Iterator[None]:
    """A CheckpointError for what goes wrong in reading a checkpoint."""
    try:
        yield
    # OSError of a file, ValueError of JSON, others of TensorStore: what counts is that it failed.
    except Exception as error:
        raise CheckpointError(f"{checkpoint}: cannot be read ({first_line(error)})") from error


def kept(directory: Path) -> list[int]:
    """Micro-steps of the complete checkpoints in a directory, in order."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())


def read_checkpoint(
    directory: Path, number: int, like: Callable[[Json], Any] | None = None
) -> tuple[Json, Any]:
    """Configuration and parts of the state of a checkpoint, without changing the directory.

    Damage is not looked for: see :func:`damage`.

    Args:
      directory: that of :class:`Checkpoints`, of a run that may be in progress.
      number: micro-step of the checkpoint.
      like: from the configuration to the shapes of some fields of the state, a dict by their names.
        The other fields are not read. Arrays are in host memory. None reads no state.

    Raises:
      CheckpointError: if it cannot be read.
    """
    # A manager would create, clean up or warn.
    checkpoint = (directory / str(number)).absolute()
    # One process reads alone; by default Orbax waits for all processes.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"process{jax.process_index()}",
    )
    json_handler = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    with (
        _one_line(checkpoint),
        ocp.Checkpointer(json_handler, multiprocessing_options=alone) as reader,
    ):
        config = reader.restore(checkpoint / "config")
    if like is None:
        return config, None
    shapes = like(config)
    how = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), shapes)
    state = ocp.args.PyTreeRestore(shapes, restore_args=how, partial_restore=True)
    tree_handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with (
        _one_line(checkpoint),
        ocp.Checkpointer(tree_handler, multiprocessing_options=alone) as reader,
    ):
        return config, reader.restore(checkpoint / "state", args=state)


def steps_done(directory: Path) -> dict[int, tuple[int, int]]:
    """:func:`done_in` of the checkpoints that can be read, by their names."""
    done = {}
    for number in kept(directory):
        with contextlib.suppress(CheckpointError):
            done[number] = done_in(directory, number)
    return done


def done_in(directory: Path, number: int) -> tuple[int, int]:
    """Steps that are done in a checkpoint, and batches of an unfinished step.

    A step has as many batches as "accumulate" of the configuration says.

    Raises:
      CheckpointError: if it cannot be read.
    """
    like = {"micro_step": jax.ShapeDtypeStruct((), np.int32)}
    config, state = read_checkpoint(directory, number, lambda _: like)
    return divmod(int(state["micro_step"]), config.get("accumulate", 1))


def renumber(directory: Path, accumulate: int) -> None:
    """Name checkpoints by the batches of their steps if a step has `accumulate` of them.

    Orbax takes the highest number for the newest checkpoint. Checkpoints of unfinished steps are
    deleted: no other number of batches continues them.
    """
    names = {}
    for number, (step, batches) in steps_done(directory).items():
        if batches:
            shutil.rmtree(directory / str(number))
        else:
            names[number] = step * accumulate
    grows = any(new > old for old, new in names.items())
    # No name is taken twice on the way, wherever this is interrupted.
    for old in sorted(names, reverse=grows):
        if names[old] != old:
            (directory / str(old)).rename(directory / str(names[old]))


def _loss(metrics: Json) -> float:
    """Not NaN, which has no place in an order."""
    return metrics["loss"] if math.isfinite(metrics["loss"]) else math.inf


DIGESTS = "digests.json"
# Orbax writes the time into it when all else is complete.
_LATER = "_CHECKPOINT_METADATA"


def write_digests(checkpoint: Path) -> None:
    """Writes sizes and digests of all files of a checkpoint into it."""
    digests = {name: [path.stat().st_size, _digest(path)] for name, path in _files(checkpoint)}
    with (checkpoint / DIGESTS).open("w", encoding="utf-8") as file:
        json.dump(digests, file)
        file.flush()
        os.fsync(file.fileno())


def damage(checkpoint: Path) -> str | None:
    """The first damage found in the files of a checkpoint, or None.

    Of an old checkpoint without digests the contents are not looked at.
    """
    try:
        json.loads((checkpoint / _LATER).read_text())
        if not (checkpoint / DIGESTS).exists():
            parts = (checkpoint / name for name in ("state", "data", "config"))
            missing = [path for path in parts if not path.is_dir()]
            return f"{missing[0]}: is missing" if missing else None
        expected = json.loads((checkpoint / DIGESTS).read_text())
    # ValueError is broken JSON or broken UTF-8.
    except (OSError, ValueError) as error:
        return f"{checkpoint}: {error}"
    files = dict(_files(checkpoint))
    for name, (size, digest) in expected.items():
        path = files.get(name)
        if path is None:
            return f"{checkpoint / name}: the file is missing"
        if path.stat().st_size != size:
            return f"{path}: {path.stat().st_size} bytes instead of {size}"
        if _digest(path) != digest:
            return f"{path}: the content is not what was written"
    return None


def quarantine(checkpoints: Path) -> list[str]:
    """Move the newest checkpoints that are damaged into "damaged" beside their directory.

    Returns:
      The damage of each. Checkpoints older than the newest good one are not read.
    """
    found = []
    steps = [p for p in checkpoints.glob("*") if p.name.isdigit()]
    for checkpoint in sorted(steps, key=lambda p: int(p.name), reverse=True):
        what = damage(checkpoint)
        if what is None:
            break
        found.append(what)
        aside = checkpoints.parent / "damaged"
        aside.mkdir(exist_ok=True)
        number = sum(p.name.split(".")[0] == checkpoint.name for p in aside.iterdir())
        checkpoint.rename(aside / (f"{checkpoint.name}.{number}" if number else checkpoint.name))
    return found


def _files(checkpoint: Path) -> list[tuple[str, Path]]:
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    return [
        (p.relative_to(checkpoint).as_posix(), p) for p in paths if p.name not in (DIGESTS, _LATER)
    ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
