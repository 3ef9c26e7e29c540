"""Directories of runs: their names, one program at a time in each, old runs set aside."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.common.checkpoints import check_directory, kept
from examples.common.config import path_of, refuse_unless_resumed
from examples.common.errors import ConfigError
from examples.common.loggers import check_loggers

try:
    import fcntl
except ImportError:  # Not on Windows.
    fcntl = None

CHECKPOINTS = "checkpoints"
"""Directory of a run, or of one of its methods, with the checkpoints."""
UNTRAINED = "untrained.json"
"""File of a comparison that has evaluated the model, and may have trained nothing yet."""


def check_name(name: str | None) -> None:
    """Raise a ConfigError if --name is no directory below --root, which --overwrite would delete.

    None and "" leave it to the program.
    """
    path = Path(name or "default")
    if not path.parts or ".." in path.parts or path.is_absolute():
        raise ConfigError(f"name must be a directory below --root, got {name!r}")


def check_apart(run_dir: Path, option: str, source: str) -> None:
    """Raise a ConfigError if --overwrite would delete the weights that an option names."""
    if path_of(source).resolve().is_relative_to(run_dir.resolve()):
        raise ConfigError(f"--overwrite would delete {option} {source}: pass another --name")


def check_start(run_dir: Path, parts: Sequence[Path], output: Any) -> None:
    """Refuse a run that would be refused after its text was read.

    Args:
      run_dir: directory of the run.
      parts: directories of what is trained in it, each with checkpoints.
      output: has the options `resume`, `overwrite` and `log_to`.

    Raises:
      ConfigError: if there is such a run, another program holds the directory, what is to be
        overwritten is no run, checkpoints would be unreadable, or the package of a logger is
        missing.
    """
    check_loggers(output.log_to)
    for part in parts:
        check_directory(part / CHECKPOINTS)
    _bring_back(run_dir.resolve())
    if run_dir.exists():
        with _held(run_dir.resolve(), output.overwrite, has_parts=list(parts) != [run_dir]):
            pass
    for part in parts:
        if kept(part / CHECKPOINTS) and not output.overwrite:
            refuse_unless_resumed(part, output.resume)


@contextlib.contextmanager
def run_directory(
    run_dir: Path, overwrite: bool, *, has_parts: bool
) -> Iterator[Callable[[], None]]:
    """Hold the directory of a run, and set an old run aside if that is to be overwritten.

    With `has_parts` directories in it have the checkpoints, one for each method, else the run has
    them itself.

    What this yields deletes the old run, once the new run has started. A start that fails leaves
    the old run as it was; after one that was killed, the next start brings it back.

    Raises:
      ConfigError: if another program holds the directory, or what is to be overwritten is no run.
    """
    run_dir = run_dir.resolve()  # A link to a directory stays one.
    old = _set_aside(run_dir)
    _bring_back(run_dir)

    def started() -> None:
        if overwrite and old.exists():
            _delete(old)

    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.enter_context(_held(run_dir, overwrite, has_parts))
        try:
            if overwrite:
                run_dir.rename(old)
                run_dir.mkdir()
                held.enter_context(_locked(run_dir))
            yield started
        finally:
            if overwrite and old.exists():
                shutil.rmtree(run_dir, ignore_errors=True)
                old.rename(run_dir)


def _set_aside(run_dir: Path) -> Path:
    return run_dir.with_name(f".{run_dir.name}.overwritten")


def _delete(old: Path) -> None:
    """Renamed first: a part of a run is never taken for one."""
    deleted = old.with_suffix(".deleted")
    if deleted.exists():  # What was killed in deleting.
        shutil.rmtree(deleted)
    shutil.rmtree(old.rename(deleted))


def _bring_back(run_dir: Path) -> None:
    """Undo what a killed start has set aside, unless its run has checkpoints."""
    old = _set_aside(run_dir)
    if not old.exists():
        return
    run_dir.mkdir(exist_ok=True)
    with _locked(run_dir):
        if any(map(kept, [run_dir / CHECKPOINTS, *_of_parts(run_dir)])):
            _delete(old)
        else:
            shutil.rmtree(run_dir)
            old.rename(run_dir)


def _of_parts(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob(f"*/{CHECKPOINTS}"))


@contextlib.contextmanager
def _held(run_dir: Path, overwrite: bool, has_parts: bool) -> Iterator[None]:
    """Hold a directory, which with `overwrite` must be empty or one of a run of this kind, without
    other runs below."""
    with _locked(run_dir):
        runs = {*run_dir.rglob(CHECKPOINTS)}
        own = runs & {*(_of_parts(run_dir) if has_parts else [run_dir / CHECKPOINTS])}
        is_run = bool(own) or (has_parts and (run_dir / UNTRAINED).exists())
        if overwrite and not is_run and any(run_dir.iterdir()):
            raise ConfigError(
                f"--overwrite deletes a run, and {run_dir} is none: use another --name"
            )
        if overwrite and runs > own:
            other = min(runs - own).parent
            raise ConfigError(f"--overwrite would delete {other} too: use another --name")
        yield


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    file = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"{directory}: another program is training this run: pass another --name"
        ) from error
    except OSError:
        pass  # Some file systems of several hosts have no locks.
    try:
        yield
    finally:
        os.close(file)
