"""JSON objects in files."""

import json
from pathlib import Path
from typing import Any

from examples.common.errors import WeightsError


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file.

    Raises:
      WeightsError: if the file is missing, malformed or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: malformed JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected an object")
    return value
