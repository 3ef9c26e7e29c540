"""The benchmark of methods: its plan, one run, and its table."""

import dataclasses
import json
import pathlib

import pytest
import tiny_encoder as tiny

from benchmarks.common.markdown import PLUS_MINUS
from benchmarks.common.result_files import write
from benchmarks.common.sweep import command
from benchmarks.finetuning.runs import Run, make
from benchmarks.finetuning.show import Show, check, read_groups, results_table
from benchmarks.finetuning.sweep import Sweep, run_sweep, runs
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

    monkeypatch.setattr("benchmarks.finetuning.runs.preset_config", small)
    run = Run(**common, rank=4, learning_rate=1e-3)
    record = make(run)
    assert run.path.name == "natural-galore-r4-lr0.001-seed1.json"
    assert json.loads(run.path.read_text()) == json.loads(json.dumps(record))
    assert record["steps"] == 2
    assert 0 <= record["metrics"]["validation"]["accuracy"] <= 1
    assert record["optimizer_bytes"] > 0
    assert make(run) is None
    with pytest.raises(ConfigError, match="epochs: 1 -> 2"):
        make(dataclasses.replace(run, epochs=2))
    with pytest.raises(ConfigError, match="rank is 0 for adamw only"):
        Run(**common, method="adamw")


def test_a_sweep_tunes_and_goes_on(common, monkeypatch):
    """AdamW is best at 1e-4, everything else at 5e-4; ranks and seeds make no difference."""
    made = []

    def make_all(todo, *_):
        for run in todo:
            made.append(run)
            write(record_of(run, 5e-4 if run.rank else 1e-4), run.path)
        return []

    monkeypatch.setattr("benchmarks.common.sweep.run_all", make_all)
    tune = Sweep(**common, tune=True, suite="tune", seeds=(100,), methods=("adamw", "lora"))
    assert run_sweep(tune) == 0
    rates = {key: sorted(r.learning_rate for r in made if r.rank == key) for key in (0, 4, 8)}
    # Every other one, and those beside the best of them.
    assert rates == {0: [2e-5, 5e-5, 1e-4, 2e-4, 1e-3], 4: rates[8], 8: rates[8]}
    assert rates[8] == [5e-5, 1e-4, 2e-4, 5e-4, 1e-3]
    count = len(made)
    assert run_sweep(tune) == 0 and len(made) == count  # Nothing is left to do.

    main = Sweep(**common, methods=("adamw", "lora"), ranks=(8,), seeds=(1, 2))
    found = [(r.seed, r.method, r.learning_rate) for r in runs(main)]
    assert found == [
        (1, "adamw", 1e-4),
        (1, "lora", 5e-4),
        (2, "adamw", 1e-4),
        (2, "lora", 5e-4),
    ]
    run = runs(main)[1]
    words = command(run, "benchmarks.finetuning")[3:]
    assert words[:1] == ["run"] and words[words.index("--learning-rate") + 1] == "0.0005"
    with pytest.raises(ConfigError, match=r"galore has no tuned learning rate at rank 8"):
        runs(Sweep(**common, methods=("galore",), ranks=(8,)))


def test_a_sweep_refines_downwards(common, monkeypatch):
    """In the longer runs AdamW is best where it was, LoRA two rates lower."""
    made = []

    def make_all(todo, *_):
        for run in todo:
            made.append((run.method, run.learning_rate))
            write(record_of(run, 1e-4 if run.method == "adamw" else 2e-4), run.path)
        return []

    monkeypatch.setattr("benchmarks.common.sweep.run_all", make_all)
    for method, rank, rate in (("adamw", 0, 1e-4), ("lora", 8, 1e-3)):
        run = Run(**common, suite="tune", method=method, rank=rank, learning_rate=rate)
        write(record_of(run, rate), run.path)
    options = {**common, "methods": ("adamw", "lora"), "ranks": (8,), "seeds": (100,)}
    refine = Sweep(**options, refine=True, suite="refine")
    assert run_sweep(refine) == 0
    assert made[:4] == [("adamw", 5e-5), ("adamw", 1e-4), ("lora", 5e-4), ("lora", 1e-3)]
    assert made[4:] == [("lora", 2e-4), ("lora", 1e-4)]
    best = [run.learning_rate for run in runs(Sweep(**options, tune_suite="refine"))]
    assert best == [1e-4, 2e-4]


def test_what_adamw_and_lora_ignore_is_not_of_their_runs(common):
    def asked(method, rank):
        run = Run(**common, method=method, rank=rank, embeddings="full", moment_bits=None)
        assert "--moment-bits None" in " ".join(command(run, "benchmarks.finetuning"))
        found = run.config().method
        return found.embeddings, found.moment_bits

    assert asked("galore", 8) == ("full", None)
    for method, rank in (("adamw", 0), ("lora", 8)):
        run = Run(**common, method=method, rank=rank)
        found = run.config().method
        assert asked(method, rank) == (found.embeddings, found.moment_bits)


def record_of(run, best):
    accuracy = 0.9 - abs(run.learning_rate - best)
    return {
        "task": run.task,
        "method": run.method,
        "rank": run.rank,
        "label": run.label,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "configuration": run.config().identity(),
        "metric": "accuracy",
        "validation": "validation",
        "metrics": {"validation": {"accuracy": accuracy}},
        "wall_seconds": 1.0,
    }


def result(method, rank, seed, accuracy, state):
    return {
        "task": "own",
        "method": method,
        "rank": rank,
        "label": f"{method} {rank}",
        "learning_rate": 1e-4,
        "seed": seed,
        "metric": "accuracy",
        "metrics": {"validation": {"accuracy": 0.5}, "test": {"accuracy": accuracy}},
        "trained_parameters": 1000,
        "optimizer_bytes": state,
        "seconds": 90.0,
        "baseline": {"validation": {"accuracy": 0.4}, "test": {"accuracy": 0.45}},
    }


def test_the_page_has_the_table_of_the_committed_runs():
    page = pathlib.Path(__file__).parents[2] / "docs/finetuning.md"
    assert results_table(read_groups(Show())) in page.read_text()


def test_the_table_and_what_is_asked():
    groups = [
        [result("adamw", 0, 1, 0.900, 2**23), result("adamw", 0, 2, 0.904, 2**23)],
        [result("lora", 8, 1, 0.897, 2**21)],
        [result("natural-galore", 8, 1, 0.8995, 2**20)],
    ]
    lines = results_table(groups).splitlines()
    spread = "50.0 ± 0.0 | 90.2 ± 0.3".replace(" ± ", PLUS_MINUS)
    assert f"| adamw 0 | 0.0001 | 2 | 1,000 | 8.00 | {spread} | 1.5 |" in lines
    assert "| tf-idf, logistic | | | | | 40.0 | 45.0 | |" in lines
    found = {t["name"].partition(": ")[2]: (round(t["value"], 3), t["met"]) for t in check(groups)}
    assert found == {
        "points above adamw": (-0.25, False),
        "points above lora": (0.25, True),
        "state over lora's": (0.5, True),
    }
