"""The comparison of methods on continued training: one run of each kind, its plan and its table."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tiny_weights as tiny

from benchmarks.common.result_files import read_suite, write
from benchmarks.common.sweep import command
from benchmarks.finetuning import continued
from benchmarks.finetuning.continued import (
    COMPARISON,
    GRIDS,
    METHODS,
    UNTRAINED,
    Run,
    Show,
    Sweep,
    make,
)
from benchmarks.finetuning.grids import TUNE_SEED, best_rates, tuning_losses
from examples.common import cli
from examples.common.errors import ConfigError
from examples.common.optimizers import trained_rates

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def common(tmp_path, monkeypatch):
    """Options of runs on tiny weights and a text of their words."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(1, 60, 40)) for _ in range(40)]
    (tmp_path / "text").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    tiny.write_directory(tmp_path / "weights")
    monkeypatch.chdir(tmp_path)  # The cache of tokens is relative.
    monkeypatch.setattr(continued, "general_texts", lambda: texts[:4])
    for name, method in METHODS.items():
        optimizer = dataclasses.replace(method.optimizer, rank=2)
        adapter = method.adapter
        if adapter.kind != "none":
            adapter = dataclasses.replace(adapter, rank=2)
        small = method._replace(optimizer=optimizer, adapter=adapter)
        monkeypatch.setitem(METHODS, name, small)
    return {
        "model": str(tmp_path / "weights"),
        "data": (str(tmp_path / "text"),),
        "steps": 2,
        "batch_size": 2,
        "seq_len": 16,
        "eval_tokens": 40,
        "root": tmp_path / "out",
    }


@pytest.mark.parametrize("method", [UNTRAINED, "lora", "galore", "natural-galore"])
def test_one_run(common, method):
    one = Run(**common, method=method)
    record = make(one)
    assert record is not None and json.loads(one.path.read_text()) == json.loads(json.dumps(record))
    assert one.path.name == f"{method}-lr0.0001-seed1.json"
    assert record["loss"].keys() == {"validation", "test", "general"}
    assert all(1 < loss < 10 for loss in record["loss"].values())
    assert make(one) is None
    with pytest.raises(ConfigError, match="steps: 2 -> 3"):
        make(dataclasses.replace(one, steps=3))
    if method != UNTRAINED:
        assert record["steps_done"] == 2 and record["state_bytes"] > 0


def test_hidden_matrices_have_the_rate_and_all_others_the_same(common):
    for name, method in METHODS.items():
        optimizer = Run(**common, method=name, learning_rate=1e-4).config().optimizer
        assert optimizer.learning_rate * method.scale == pytest.approx(1e-4)
        assert optimizer.learning_rate * optimizer.unprojected_ratio == pytest.approx(3e-5)


def test_a_run_that_diverges_is_recorded_and_described(common):
    record = make(Run(**common, method="adamw", learning_rate=1e30))
    assert record["diverged"] and record["loss"]["validation"] is None
    assert continued._outcome(record) == "diverged"


def test_the_untrained_model_is_the_one_that_training_starts_from(common, monkeypatch):
    untrained = make(Run(**common, method=UNTRAINED))
    started = make(Run(**common, method="adamw", learning_rate=1e-12))
    monkeypatch.setattr(continued, "UNPROJECTED_RATE", 1e-12)
    still = make(Run(**common, method="adamw", learning_rate=1e-12, seed=2))
    assert still["loss"] == pytest.approx(untrained["loss"], rel=1e-6)
    assert started["loss"] != pytest.approx(untrained["loss"], rel=1e-6)


def test_the_command_line_of_a_run_makes_the_same_run(common):
    one = Run(**common | {"data": ("a.txt", "b c.txt")}, method="lora", seed=7)
    words = command(one, "program")[3:]
    assert cli.parse(Run | Sweep | Show, "program", words) == one
    show = cli.parse(Run | Sweep | Show, "program", ["show", "--root=~/x"])
    assert show.root == pathlib.Path.home() / "x"


def test_a_sweep_and_its_table(tmp_path, monkeypatch, capsys):
    made = []

    def make_all(todo, *_):
        for one in todo:
            made.append((one.method, one.learning_rate, one.seed))
            loss = one.seed / 10 + 1000 * one.learning_rate
            record = {
                "method": one.method,
                "learning_rate": one.learning_rate,
                "seed": one.seed,
                "configuration": one.configuration(),
                "diverged": False,
                "loss": {"validation": loss, "test": loss, "general": 2 * loss},
                "state_bytes": 2**21,
                "training_seconds": 90.0,
            }
            write(record, one.path)
        return []

    monkeypatch.setattr("benchmarks.common.sweep.run_all", make_all)
    sweep = Sweep(root=tmp_path, methods=("adamw", "lora"), seeds=(1, 2))
    assert len({len(grid) for grid in GRIDS.values()}) == 1
    assert COMPARISON.run(sweep) == 0
    best = {name: min(GRIDS[name]) for name in ("adamw", "lora")}
    tuning = [(name, rate, TUNE_SEED) for name in best for rate in GRIDS[name]]
    final = [(name, rate, seed) for seed in (1, 2) for name, rate in best.items()]
    assert made == [(UNTRAINED, 0.0, TUNE_SEED), *tuning, *final]
    capsys.readouterr()
    assert COMPARISON.run(Show(root=tmp_path)) == 0
    _, _, untrained, *methods = capsys.readouterr().out.replace("\u00a0", " ").splitlines()
    assert untrained == "| untrained | | | | 10.000 | 20.000 | | | |"
    assert methods == [
        "| adamw | 3e-05, end of the grid | 2 | 2.0 | 0.180 ± 0.071 | 0.360 ± 0.141 |  |  | 1.5 |",
        # Seeds move losses, not differences.
        "| lora | 0.0003, end of the grid | 2 | 2.0 | 0.450 ± 0.071 | 0.900 ± 0.141 | "
        "0.270 ± 0.000 | 0.540 ± 0.000 | 1.5 |",
    ]


@pytest.mark.parametrize("name", METHODS)
def test_the_best_rates_are_the_defaults_of_further_training(name):
    tuned = tuning_losses(read_suite(Show.root, "main"), lambda r: r["loss"]["validation"])
    method = METHODS[name]
    rate, ratio = trained_rates(method.optimizer.name, method.adapter.kind)
    assert rate * method.scale == pytest.approx(best_rates(tuned)[name])
    assert ratio is not None and rate * ratio == pytest.approx(continued.UNPROJECTED_RATE)
