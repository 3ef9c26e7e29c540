"""Runs the notebooks: ``python -m notebooks.build [01_quickstart ...]``, all of them by default.

A notebook is a script, ``NN_name.py``, in the percent format of jupytext, and beside it an
``.ipynb`` of the same cells with what they printed and drew. The script is the one to edit.
"""

import argparse
import base64
import io
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

DIRECTORY = Path(__file__).parent
# Where the notebooks look for the library. A fork changes it here, in the badges and in the install
# cells; tests/test_notebooks.py compares them.
REPOSITORY = "natgalore/natgalore_jax"
SIZE = "NATGALORE_NOTEBOOK_SIZE"

_METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Each notebook says for itself on how many devices it runs.
_DEVICES = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")


def scripts() -> list[Path]:
    return sorted(DIRECTORY.glob("[0-9]*.py"))


def read_script(path: Path) -> NotebookNode:
    """The cells of a script, with names that do not change from one run to the next."""
    notebook: Any = jupytext.read(path, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    notebook.metadata = nbformat.from_dict(_METADATA)
    return notebook


def execute(notebook: NotebookNode, size: str | None = None, timeout: float = 1800) -> None:
    """Runs all cells in a new kernel, which fills in their outputs.

    Args:
      notebook: is changed.
      size: what the variable SIZE of the notebook becomes; None leaves it to the environment.
      timeout: seconds for one cell.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    env = {name: value for name, value in os.environ.items() if name not in _DEVICES}
    if size is not None:
        env[SIZE] = size
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(DIRECTORY)}},
    )
    client.execute(env=env)
    notebook.metadata = nbformat.from_dict(_METADATA)


def shrink_plots(notebook: NotebookNode) -> None:
    """Draws the plots with 64 colours: a third of the bytes, which are in the history for good."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                plot = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                small = io.BytesIO()
                plot.convert("RGB").quantize(64).save(small, "png", optimize=True)
                output.data["image/png"] = base64.b64encode(small.getvalue()).decode()


def _processor_seconds() -> float:
    """Of the kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="for example 01_quickstart; default: all")
    names = parser.parse_args().names or [path.stem for path in scripts()]
    for name in names:
        notebook = read_script(DIRECTORY / f"{name}.py")
        start = time.perf_counter(), _processor_seconds()
        execute(notebook)
        seconds, processor = time.perf_counter() - start[0], _processor_seconds() - start[1]
        shrink_plots(notebook)
        target = DIRECTORY / f"{name}.ipynb"
        target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        size = target.stat().st_size / 1e3
        took = f"{seconds:.0f} s, {processor:.0f} s of processor time"
        print(f"{target}: {took}, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
