"""The benchmark of methods: its plan, one run, and its table."""

import dataclasses
import json
import pathlib

import pytest
import tiny_encoder as tiny

from benchmarks.common.markdown import PLUS_MINUS
from benchmarks.common.result_files import read_results, write
from benchmarks.finetuning import grids
from benchmarks.finetuning.encoder import (
    COMPARISON,
    GRIDS,
    Run,
    Show,
    Sweep,
    make,
    results_table,
    targets,
)
from benchmarks.finetuning.grids import TUNE_SEED
from examples.common.errors import ConfigError
from examples.finetune.encoder.run_config import preset_config

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def common(tmp_path):
    rows = tiny.write_rows(tmp_path / "rows", {"train": 12, "dev": 6})
    tensors = {k: v for k, v in tiny.weights("bert").items() if not k.startswith("classifier")}
    model = tiny.write_model(tmp_path / "model", tensors=tensors)
    return {"task": "own", "data": rows, "model": str(model), "epochs": 1, "root": tmp_path / "out"}


def test_one_run(common, monkeypatch):
    def small(*names):
        return dataclasses.replace(preset_config(*names), max_length=16, batch_size=6)

    monkeypatch.setattr("benchmarks.finetuning.encoder.preset_config", small)
    run = Run(**common, method="natural-galore-r4", learning_rate=1e-3)
    record = make(run)
    assert run.path == common["root"] / "main/seeds/natural-galore-r4-lr0.001-seed1.json"
    assert json.loads(run.path.read_text()) == json.loads(json.dumps(record))
    assert record["steps"] == 2 and record["method"] == run.method
    assert record["label"] == "natural-galore, rank 4"
    assert record["configuration"]["method"]["rank"] == 4
    assert 0 <= record["metrics"]["validation"]["accuracy"] <= 1
    assert record["losses"]["validation"] > 0 and record["optimizer_bytes"] > 0
    assert make(run) is None
    with pytest.raises(ConfigError, match="epochs: 1 -> 2"):
        make(dataclasses.replace(run, epochs=2))


def test_every_method_has_as_many_rates():
    assert len({len(rates) for rates in GRIDS.values()}) == 1


def test_a_sweep_tunes_by_the_validation_loss(common, monkeypatch):
    """AdamW is best at 5e-5, LoRA at 1e-3."""
    made = []

    def make_all(todo, *_):
        for run in todo:
            made.append((run.seed, run.method, run.learning_rate))
            best = 5e-5 if run.method == "adamw" else 1e-3
            losses = {"validation": 0.5 + abs(run.learning_rate - best)}
            record = grids.record_of(run) | {"diverged": False, "losses": losses}
            write(record | {"validation": "validation"}, run.path)
        return []

    monkeypatch.setattr("benchmarks.common.sweep.run_all", make_all)
    sweep = Sweep(**common, methods=("adamw", "lora-r8"), seeds=(1, 2))
    assert COMPARISON.run(sweep) == 0
    tuning = [(100, name, rate) for name in sweep.methods for rate in GRIDS[name]]
    assert made[:8] == tuning
    assert made[8:] == [
        (seed, *best) for seed in (1, 2) for best in (("adamw", 5e-5), ("lora-r8", 1e-3))
    ]
    assert COMPARISON.run(sweep) == 0 and len(made) == 12  # Nothing is left to do.


def result(method, seed, accuracy, state):
    name, _, rank = method.partition("-r")
    return {
        "task": "own",
        "method": method,
        "label": f"{name}, rank {rank}" if rank else name,
        "learning_rate": GRIDS[method][1],
        "seed": seed,
        "diverged": False,
        "metric": "accuracy",
        "metrics": {"validation": {"accuracy": 0.5}, "test": {"accuracy": accuracy}},
        "losses": {"validation": 0.25, "test": 0.125},
        "trained_parameters": 1000,
        "optimizer_bytes": state,
        "seconds": 90.0,
        "baseline": {"validation": {"accuracy": 0.4}, "test": {"accuracy": 0.45}},
    }


def test_the_page_has_the_tables_of_the_committed_runs():
    page = pathlib.Path(__file__).parents[2] / "docs/finetuning.md"
    for suite in ("main", "unclipped"):
        assert results_table(read_results(Show().root, suite)) in page.read_text()


def test_the_table_and_what_is_asked():
    records = [
        result("adamw", 1, 0.900, 2**23),
        result("adamw", 2, 0.904, 2**23),
        result("adamw", TUNE_SEED, 0.1, 2**23),
        result("lora-r8", 1, 0.897, 2**21),
        result("natural-galore-r8", 1, 0.8995, 2**20),
    ]
    lines = results_table(records).splitlines()
    spread = "50.0 ± 0.0 | 90.2 ± 0.3 | 0.125 ± 0.000".replace(" ± ", PLUS_MINUS)
    assert f"| adamw | 2e-05 | 2 | 1,000 | 8.00 | {spread} | 1.5 |" in lines
    assert "| tf-idf, logistic | | | | | 40.0 | 45.0 | | |" in lines
    del records[0]["losses"]  # As in results of before.
    assert f"{spread[:-16]} | | 1.5 |" in results_table(records)
    found = {
        t["name"].partition(": ")[2]: (round(t["value"], 3), t["met"]) for t in targets(records)
    }
    assert found == {
        "points above adamw": (-0.25, False),
        "points above lora": (0.25, True),
        "state over lora's": (0.5, True),
    }
    with pytest.raises(ConfigError, match="no finished run after the tuning yet"):
        results_table([result("adamw", TUNE_SEED, 0.1, 2**23)])


def test_seeds_that_diverged_are_counted():
    lost = {"method": "lora-r8", "label": "lora, rank 8", "learning_rate": 1e-3, "diverged": True}
    records = [
        result("adamw", 1, 0.900, 2**23),
        result("lora-r8", 1, 0.8, 2**21),
        lost | {"seed": 2},
        result("natural-galore-r8", 1, 0.8, 2**20),
        lost | {"method": "lora-r4", "label": "lora, rank 4", "seed": 1},
    ]
    lines = results_table(records).splitlines()
    assert any(
        line.startswith("| lora, rank 8 | 0.001 | 2, 1 diverged | 1,000 |") for line in lines
    )
    assert "| lora, rank 4 | 0.001 | 1, 1 diverged | | | | | | |" in lines
    above = next(t for t in targets(records) if "above lora" in t["name"])
    assert above["value"] == pytest.approx(40.0)  # A seed that diverged has no point.


def test_seeds_at_another_rate_are_another_row():
    other = result("adamw", 3, 0.5, 2**23) | {"learning_rate": 1e-5}
    records = [result("adamw", 1, 0.900, 2**23), other]
    assert sum(line.startswith("| adamw |") for line in results_table(records).splitlines()) == 2
    with pytest.raises(
        ConfigError, match="adamw: seeds at several learning rates, 2e-05 and 1e-05"
    ):
        targets(records)


def test_a_method_that_diverges_at_all_rates_stops_no_other(common, capsys):
    sweep = Sweep(**common, methods=("adamw", "lora-r8"), seeds=(1,))
    for name in sweep.methods:
        for rate in GRIDS[name]:
            run = Run(**common, method=name, learning_rate=rate, seed=TUNE_SEED)
            record = grids.record_of(run) | {"diverged": name == "lora-r8", "validation": "v"}
            write(record | {"losses": {"v": rate}}, run.path)
    assert [(run.method, run.seed) for run in COMPARISON.runs(sweep)][8:] == [("adamw", 1)]
    assert "left out: lora-r8: the loss is not finite" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        Sweep(**common, workers=0)
