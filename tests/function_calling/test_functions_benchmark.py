"""The comparison of methods on function calling: its plan, one run, and its table."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_planner as tiny

from benchmarks.common.result_files import read_suite, write
from benchmarks.finetuning.functions import (
    COMPARISON,
    GRIDS,
    Run,
    Show,
    Sweep,
    make,
    results_table,
    runs,
)
from benchmarks.finetuning.grids import TUNE_SEED, best_rates, is_done
from examples.common.errors import ConfigError
from examples.finetune.planner.methods import MethodConfig
from examples.finetune.planner.prompts import PromptConfig
from examples.finetune.planner.run_config import RunConfig, preset_config

pytestmark = pytest.mark.usefixtures("fast_compile")


def record_of(run, loss, success=0.5):
    scores = {"loss": loss, "metrics": {"success": success, "aware_success": success / 2}}
    return {
        "method": run.method,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "configuration": run.config().identity() | {"method_name": run.method},
        "diverged": loss is None,
        "untrained": {"loss": 2.0, "metrics": {"success": 0.125, "aware_success": 0.0}},
        "validation": scores,
        "test": scores,
        "optimizer_bytes": 2**21,
        "seconds": 90.0,
        "wall_seconds": 1.0,
    }


@pytest.mark.parametrize(("preset", "dataset"), [("small", "bfcl"), ("nested", "nestful")])
def test_a_run_has_the_records_and_steps_of_its_preset(preset, dataset):
    assert Run().preset == "small"
    found = Run(preset=preset, method="lora", learning_rate=1e-3, seed=2).config()
    asked = preset_config(preset)
    assert asked.dataset == dataset
    own = {"seed", "method", "output"}
    values = [{k: v for k, v in vars(config).items() if k not in own} for config in (found, asked)]
    assert values[0] == values[1]
    assert (found.seed, found.method.learning_rate, found.output.resume) == (2, 1e-3, True)


def test_one_run_at_tiny_size(tmp_path, monkeypatch):
    options = tiny.options(tmp_path)
    data, model = options.pop("data"), options.pop("model")
    small = RunConfig(
        **options,
        prompt=PromptConfig(examples=0, negatives=1, details=False),
        method=MethodConfig(rank=2, update_interval=2),
    )
    monkeypatch.setattr("benchmarks.finetuning.functions.preset_config", lambda _: small)
    common = {"data": data, "model": model, "limit": 4, "eval_limit": 1}
    one = Run(**common, root=tmp_path / "out", work=tmp_path / "work", method="lora")
    record = make(one)
    assert record is not None and json.loads(one.path.read_text()) == json.loads(json.dumps(record))
    assert one.path.name == "lora-lr0.0003-seed1.json"
    assert record["steps"] == 2 and not record["diverged"]
    assert record["untrained"]["plans"] == record["test"]["plans"] == 1
    # The weights of the run are gone; what was measured before training serves the other runs.
    assert [path.name for path in (tmp_path / "work" / "main").iterdir()] == ["untrained"]
    assert is_done(one) and make(one) is None
    with pytest.raises(ConfigError, match="limit: 4 -> 5"):
        make(dataclasses.replace(one, limit=5))
    worse = dataclasses.replace(one, method="adamw", learning_rate=1e30)
    diverged = make(worse)
    assert diverged is not None and diverged["diverged"]


def test_a_sweep_tunes_all_methods_by_as_many_runs_and_goes_on(tmp_path, monkeypatch):
    made = []
    best = {"adamw": 1e-4, "lora": 1e-3}

    def make_all(todo, *_):
        for one in todo:
            made.append((one.method, one.learning_rate, one.seed))
            distance = abs(one.learning_rate - best[one.method])
            write(record_of(one, 1 + distance if distance < 2e-3 else None), one.path)
        return []

    monkeypatch.setattr("benchmarks.common.sweep.run_all", make_all)
    sweep = Sweep(root=tmp_path, methods=("adamw", "lora"), seeds=(1, 2))
    assert len({len(grid) for grid in GRIDS.values()}) == 1
    assert COMPARISON.run(sweep) == 0
    tuning = [(method, rate, TUNE_SEED) for method in best for rate in GRIDS[method]]
    assert made[: len(tuning)] == tuning
    final = [(method, rate, seed) for seed in (1, 2) for method, rate in best.items()]
    assert made[len(tuning) :] == final
    assert COMPARISON.run(sweep) == 0 and len(made) == len(tuning + final)  # Nothing is left to do.
    assert len(runs(sweep)) == len(made)


def test_the_page_has_the_plans_of_several_calls():
    page = (Path(__file__).parents[2] / "docs" / "pretrained.md").read_text()
    names = {
        "adamw": "AdamW",
        "lora": "LoRA, rank 32",
        "galore": "GaLore, rank 32",
        "natural-galore": "Natural GaLore, rank 32",
    }
    records = read_suite(Run().root, "nested")
    assert {r["method"] for r in records} == set(names)
    for r in records:
        validation, test = r["validation"]["metrics"], r["test"]["metrics"]
        shares = validation["success"], test["success"], test["aware_success"]
        row = [names[r["method"]], *(f"{100 * share:.1f} %" for share in shares)]
        assert f"| {' | '.join(row)} | {r['test']['loss']:.3f} |" in page


def test_what_cannot_be_swept():
    with pytest.raises(ConfigError, match=r"methods must be some of adamw, .*; got fira"):
        Sweep(methods=("fira",))
    with pytest.raises(ConfigError, match="seeds must not contain 100"):
        Sweep(seeds=(100,))


def test_a_method_that_always_diverges_has_no_best_rate():
    assert best_rates({"lora": {1e-3: None}, "adamw": {1e-4: None, 1e-5: 2.0}}) == {"adamw": 1e-5}


def test_the_table(tmp_path, capsys):
    for seed, success in ((1, 0.5), (2, 0.6), (TUNE_SEED, 0.0)):
        one = Run(root=tmp_path, method="lora", learning_rate=3e-3, seed=seed)
        write(record_of(one, 0.25, success), one.path)
    assert COMPARISON.run(Show(root=tmp_path)) == 0
    _, _, untrained, lora = capsys.readouterr().out.replace("\u00a0", " ").splitlines()
    assert untrained == "| untrained | | | | 2.000 | 12.5 | 0.0 | |"
    assert lora.startswith(
        "| lora | 0.003, end of the grid | 2 | 2.00 | 0.250 ± 0.000 | 55.0 ± 7.1"
    )
    with pytest.raises(ConfigError, match="no finished run after the tuning yet"):
        results_table([record_of(Run(method="lora", seed=TUNE_SEED), 0.25)])
