"""The order of the packages: imports go only upwards in this list."""

import ast
from pathlib import Path

import durations
import pytest

ROOT = Path(__file__).parent.parent
ORDERS = {
    "natgalore_jax/_src": [
        "params",
        "kernels",
        "states",
        "refresh",
        "subspace",
        "low_bits",
        "optimizers",
        "contrib",
        "training",
        "per_layer",
        "memory",
    ],
    "examples": [
        "common",
        "pretrained",
        "llama",
        "finetune",
        "many_devices",
        "recipes",
        "papers",
    ],
    "examples/llama": [
        "model",
        "data",
        "weights",
        "training",
        "distributed",
        "memory",
        "plan",
    ],
    "examples/finetune": ["encoder", "planner"],
    "benchmarks": ["common", "pretraining", "finetuning", "memory", "optimizer", "distributed"],
}


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = (a.name for n in nodes if isinstance(n, ast.Import) for a in n.names)
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    # A name may be a module of a package.
    names = {f"{n.module}.{a.name}" for n in froms for a in n.names}
    return {n.module for n in froms} | names | set(plain)


@pytest.mark.parametrize("root", ORDERS)
def test_packages_import_only_what_is_above_them(root):
    order, folder = ORDERS[root], ROOT / root
    assert sorted(order) == sorted(p.parent.name for p in folder.glob("*/__init__.py"))
    wrong = [
        f"{path.relative_to(folder)} imports {name}"
        for i, package in enumerate(order)
        for path in (folder / package).rglob("*.py")
        for name in imports(path)
        for later in order[i + 1 :]
        if f"{name}.".startswith(f"{root.replace('/', '.')}.{later}.")
    ]
    assert wrong == []


@pytest.mark.parametrize("root", ORDERS)
def test_modules_do_not_import_each_other_in_a_circle(root):
    files = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / root).rglob("*.py")
    }
    open_ = {name: imports(p) & files.keys() - {name} for name, p in files.items()}
    while leaves := [name for name, names in open_.items() if not names & open_.keys()]:
        for name in leaves:
            del open_[name]
    assert open_ == {}


def test_shards_have_every_test_file_once():
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py")}
    parts = [durations.shard(files, number, 4) for number in (1, 2, 3, 4)]
    assert set().union(*parts) == files and sum(map(len, parts)) == len(files)
