"""Functions as command lines."""

import sys
from collections.abc import Callable
from typing import Any

import tyro


def run_from_command_line(main: Callable[..., Any]) -> Any:
    """Call ``main`` with the arguments of ``python -m MODULE``, whose docstring is the help."""
    module = sys.modules["__main__"]
    assert module.__spec__ is not None  # Programs are run by -m alone: they import one another.
    return tyro.cli(main, prog=f"python -m {module.__spec__.name}", description=module.__doc__)
