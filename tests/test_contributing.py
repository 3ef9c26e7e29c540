"""The diffs of CONTRIBUTING, "Additions", apply to the code as it is, and do what they say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DIFFS = re.findall(r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)

# In an interpreter of its own, because the package is another one there.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax, pathlib, sys
import natgalore_jax as ng
from contract import FACTORIES

assert pathlib.Path(ng.__file__).is_relative_to(pathlib.Path.cwd())
target = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 9)), jnp.float32)
loss = lambda w: jnp.mean(jnp.square(w["w"] - target))
closer = optax.scale_by_learning_rate(0.05)
chains = {
    "sketch": ng.chain(
        ng.low_rank_project(2, 3, method="sketch"), optax.scale_by_adam(), ng.project_back(), closer
    ),
    "flat": ng.chain(
        ng.low_rank_project(2, 3), optax.scale_by_adam(), ng.project_back(residual="flat"), closer
    ),
    "directions": ng.chain(
        ng.low_rank_project(2, 3), ng.scale_by_directions(), ng.project_back(), closer
    ),
}
for name, tx in chains.items():
    w = {"w": jnp.zeros((2, 6, 9))}
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(12):
        updates, state = update(jax.grad(loss)(w), state, w)
        w = optax.apply_updates(w, updates)
    assert loss(w) < 0.9 * loss({"w": 0 * target}), (name, loss(w))

report = ng.memory_report(chains["directions"], w)
assert report.part_bytes["inner"] == 2 * 2 * 9 * 4, report
assert "scale_by_directions" in FACTORIES
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A copy of the library with all diffs applied."""
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(ROOT / "natgalore_jax", folder / "natgalore_jax")
    examples = ("__init__.py", "common/__init__.py", "common/composed.py")
    names = ("tests/contract.py", "tests/composed.py", "docs/api.md")
    for name in (*names, *(f"examples/{x}" for x in examples)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for diff in DIFFS:
        apply(diff, folder)
    return folder


def apply(diff, folder):
    """Hunks have no line numbers: the old lines stand once in the file."""
    for section in re.split(r"^--- .*\n", diff, flags=re.M)[1:]:
        name, *hunks = re.split(r"^@@\n", section, flags=re.M)
        path = folder / name.removeprefix("+++ b/").strip()
        text = path.read_text() if path.exists() else ""
        for hunk in hunks:
            old, new = (
                "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] in kinds)
                for kinds in (" -", " +")
            )
            assert not old or text.count(old) == 1, f"{path.name} has {text.count(old)} of\n{old}"
            text = text.replace(old, new) if old else new
        path.write_text(text)


def test_what_is_added_works(patched):
    environment = {
        "PYTHONPATH": f"{patched}:{patched / 'tests'}",
        "PATH": "",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=patched, env=environment, check=True)


@pytest.mark.parametrize(
    ("number", "places"), [(0, 2), (1, 2), (2, 4)], ids=["method", "rule", "preconditioner"]
)
def test_it_takes_few_places(number, places):
    assert len(DIFFS) == 3
    assert len(re.findall(r"^\+\+\+ ", DIFFS[number], re.M)) == places
