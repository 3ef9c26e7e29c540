"""Configurations as plain values, and the fields in which two of them differ."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.common.errors import ConfigError

Json = dict[str, Any]
INT32 = 2**31  # Above all whole numbers that arrays hold.


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


def write_json(path: Path, value: Json) -> None:
    """Write a value as an indented JSON file, in a directory that is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(with_null(value), indent=2, allow_nan=False) + "\n"
    if path.exists() and not path.is_file():  # Such as /dev/stdout.
        path.write_text(text, encoding="utf-8")
    else:
        replace_text(path.resolve(), text)


def with_null(value: Any) -> Any:
    """A value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: with_null(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [with_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_text(path: Path, text: str) -> None:
    """Write a file that is never seen in part, whatever interrupts this."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


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


def refuse_unless_resumed(run_dir: Path, resume: bool) -> None:
    """Raise a ConfigError for a directory with a run, unless it is resumed."""
    if not resume:
        raise ConfigError(
            f"{run_dir} already has a run: pass --resume to continue it, --name for another one, "
            "or --overwrite to delete it"
        )


def check_same(
    run_dir: Path,
    old: Json,
    new: Json,
    differences: Callable[[Json, Json], list[str]] = differences,
) -> None:
    """Raise a ConfigError that names the fields in which a run to be resumed differs."""
    if changed := differences(old, new):
        raise ConfigError(f"{run_dir} was made with another configuration: {', '.join(changed)}")
