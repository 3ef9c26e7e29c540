"""Functions that are called in processes of their own, and return JSON values."""

import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def call(function: str, *, env: Mapping[str, str] | None = None, **arguments: Any) -> Any:
    """Result of a function in a new process with this environment.

    Args:
      function: module and name, ``"benchmarks.memory.gpu_run:run"``.
      env: the environment; None is that of this process.
      arguments: of the function, JSON values.

    Raises:
      RuntimeError: if the process fails, with its error output.
    """
    (result,) = results(start(function, env=env, stderr=subprocess.PIPE, **arguments))
    return result


def start(
    function: str,
    *,
    env: Mapping[str, str] | None = None,
    stderr: int | None = None,
    **arguments: Any,
) -> subprocess.Popen[str]:
    """The process of a :func:`call`, for :func:`results`."""
    command = [sys.executable, "-m", __name__, function, json.dumps(arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)


def results(*processes: subprocess.Popen[str]) -> list[Any]:
    """Results of processes that run at the same time, after all of them have ended."""
    printed = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, printed, strict=True):
        if process.returncode:
            raise RuntimeError(f"{process.args}: exit code {process.returncode}\n{errors or ''}")
    return [json.loads(output.splitlines()[-1]) for output, _ in printed]


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    found = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps(found))
