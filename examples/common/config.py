"""Configurations as plain values, and the fields in which two of them differ."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from examples.common.errors import ConfigError

try:
    import fcntl
except ImportError:  # Not on Windows.
    fcntl = None

Json = dict[str, Any]
INT32 = 2**31  # Above all whole numbers that arrays hold.
CHECKPOINTS = "checkpoints"
"""Directory of a run, or of one of its methods, with the checkpoints."""


def plain(value: Any) -> Any:
    """A configuration as JSON values: paths as text, tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def path_of(name: str) -> Path:
    """The path of a name, with ~ for the home directory."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user.


def check_apart(run_dir: Path, option: str, source: str) -> None:
    """Raise a ConfigError if --overwrite would delete the weights that an option names."""
    if path_of(source).resolve().is_relative_to(run_dir.resolve()):
        raise ConfigError(f"--overwrite would delete {option} {source}: pass another --name")


def check_range(config: Any, interval: str, *names: str) -> None:
    """Raise a ConfigError for a field outside an interval such as "[0, 1)".

    None is allowed. NaN is in no interval, and infinity in none that is open there.
    """
    low, high = interval[1:-1].split(", ")
    least = f"{'at least' if interval[0] == '[' else 'above'} {low}"
    most = f"{'at most' if interval[-1] == ']' else 'less than'} {high}"
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        above = value >= float(low) if interval[0] == "[" else value > float(low)
        below = value <= float(high) if interval[-1] == "]" else value < float(high)
        if not (above and below):
            raise ConfigError(f"{name} must be {least} and {most}, got {value}")


def check_name(name: str | None) -> None:
    """Raise a ConfigError if --name is no directory below --root, which --overwrite would delete.

    None and "" leave it to the program.
    """
    if name and (not Path(name).parts or ".." in Path(name).parts):
        raise ConfigError(f"name must be a directory below --root, got {name!r}")


@contextlib.contextmanager
def run_directory(run_dir: Path, overwrite: bool) -> Iterator[Callable[[], None]]:
    """Hold the directory of a run, and set an old run aside if that is to be overwritten.

    What this yields deletes the old run, once the new run has started. A start that fails leaves
    the old run as it was. After one that was killed, the next one that overwrites still does.

    Raises:
      ConfigError: if another program holds the directory, or what is to be overwritten is no run.
    """
    run_dir = run_dir.resolve()  # A link to a directory stays one.
    old = run_dir.with_name(f".{run_dir.name}.overwritten")

    def started() -> None:
        if overwrite and old.exists():  # Renamed first: a part of a run is never taken for one.
            shutil.rmtree(old.rename(run_dir.with_name(f".{run_dir.name}.deleted")))

    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        held.enter_context(_locked(run_dir))
        runs = [run_dir / CHECKPOINTS, *run_dir.glob(f"*/{CHECKPOINTS}")]
        if overwrite and any(run_dir.iterdir()) and not any(path.exists() for path in runs):
            raise ConfigError(
                f"--overwrite deletes a run, and {run_dir} is none: use another --name"
            )
        try:
            if overwrite:
                if old.exists():
                    shutil.rmtree(run_dir)
                else:
                    run_dir.rename(old)
                run_dir.mkdir()
                held.enter_context(_locked(run_dir))
            yield started
        finally:
            if overwrite and old.exists():
                shutil.rmtree(run_dir, ignore_errors=True)
                old.rename(run_dir)


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


def write_json(path: Path, value: Json) -> None:
    """Write a value as an indented JSON file, in a directory that is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def differences(
    old: Json, new: Json, *, defaults: Json | None = None, harmless: tuple[str, ...] = ()
) -> list[str]:
    """Fields that differ, as "field: old -> new".

    Args:
      old: nested values, such as those of a checkpoint.
      new: the values to compare with.
      defaults: values of fields that did not exist when `old` was made.
      harmless: beginnings of the names of fields that may differ.
    """
    old, new, known = _flat(old), _flat(new), _flat(defaults or {})
    old = {key: value for key, value in known.items() if key in new} | old
    return [
        f"{key}: {_show(old.get(key))} -> {_show(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if not key.startswith(harmless) and old.get(key) != new.get(key)
    ]


def _show(value: Any) -> str:
    return "(default)" if value is None else str(value)


def _flat(tree: Json, prefix: str = "") -> Json:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
