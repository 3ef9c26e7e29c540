"""Configurations as plain values, and the fields in which two of them differ."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from examples.common.errors import ConfigError

Json = dict[str, Any]


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


@contextlib.contextmanager
def replacing(run_dir: Path, wanted: bool) -> Iterator[Callable[[], None]]:
    """Set an old run aside; what this yields deletes it, once the new run has started.

    A start that fails leaves the old run as it was. After one that was killed, the next one that
    overwrites still does.
    """
    run_dir = run_dir.resolve()  # A link to a directory stays one.
    old = run_dir.with_name(f".{run_dir.name}.overwritten")
    if not wanted or not (old.exists() or run_dir.exists()):
        yield lambda: None
        return
    if old.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
    else:
        run_dir.rename(old)
    run_dir.mkdir()

    def started() -> None:
        if old.exists():  # Renamed first: a part of a run is never taken for one.
            shutil.rmtree(old.rename(run_dir.with_name(f".{run_dir.name}.deleted")))

    try:
        yield started
    finally:
        if old.exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            old.rename(run_dir)


def write_json(path: Path, value: Json) -> None:
    """Write a value as an indented JSON file."""
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
