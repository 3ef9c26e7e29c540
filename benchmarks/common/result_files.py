"""Result files: written whole or not at all, small, and readable line by line."""

import functools
import json
import os
from pathlib import Path
from typing import Any

from examples.common.config import differences
from examples.common.errors import ConfigError

Json = dict[str, Any]


def write(record: Json, path: Path, *, allow_nan: bool = False) -> None:
    """One key a line; the file appears complete."""
    compact = functools.partial(json.dumps, separators=(",", ":"), allow_nan=allow_nan)
    lines = (f"{json.dumps(key)}: {compact(value)}" for key, value in record.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(unfinished, path)


def read(path: Path) -> Json:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a result file ({error})") from error
    if not isinstance(record, dict) or "configuration" not in record:
        raise ConfigError(f"{path}: not a result file (no configuration)")
    return record


def read_suite(root: Path, suite: str) -> list[Json]:
    """All results of a suite, in the order of their paths."""
    return [read(path) for path in sorted((root / suite).glob("*/*.json"))]


def read_results(root: Path, suite: str) -> list[Json]:
    """As ``read_suite``, where there must be some.

    Raises:
      ConfigError: if there are none.
    """
    records = read_suite(root, suite)
    if not records:
        raise ConfigError(f"{root / suite}: no results; make them with the sweep command")
    return records


def is_done(path: Path, configuration: Json, defaults: Json | None = None) -> bool:
    """Whether the run was made already.

    Args:
      path: of its file.
      configuration: of the run.
      defaults: values of options that did not exist when the file was made.

    Raises:
      ConfigError: if the file was made with another configuration.
    """
    if not path.exists():
        return False
    changed = differences(read(path)["configuration"], configuration, defaults=defaults)
    if changed:
        raise ConfigError(
            f"{path} was made with another configuration ({', '.join(changed)}): "
            "delete it, or use another --suite"
        )
    return True
