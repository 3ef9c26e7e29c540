"""Result files: written whole or not at all, small, and readable line by line."""

import json
import os
from pathlib import Path
from typing import Any

from examples.common.errors import ConfigError
from examples.llama.run_config import RunConfig, differences

Json = dict[str, Any]


def write(record: Json, path: Path) -> None:
    """One key a line; the file appears complete."""
    lines = (f"{json.dumps(key)}: {_compact(value)}" for key, value in record.items())
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


def is_done(path: Path, configuration: Json) -> bool:
    """Whether the run was made already.

    Raises:
      ConfigError: if it was made with another configuration.
    """
    if not path.exists():
        return False
    done = read(path)["configuration"]
    # An option that the training program has got since then was at its default.
    done["run"] = _filled(done["run"], like=configuration["run"], defaults=RunConfig().to_dict())
    changed = differences(done, configuration)
    if changed:
        raise ConfigError(
            f"{path} was made with another configuration ({', '.join(changed)}): "
            "delete it, or use another --suite"
        )
    return True


def _filled(old: Json, like: Json, defaults: Json) -> Json:
    """``old`` with the defaults of those options that are in ``like`` and not in ``old``."""
    filled = dict(old)
    for key, value in like.items():
        if key not in old:
            filled[key] = defaults.get(key)
        elif isinstance(value, dict) and isinstance(old[key], dict):
            filled[key] = _filled(old[key], value, defaults.get(key) or {})
    return filled


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
