"""The claims of the README are those of the result files, and it stays short."""

import json
import re
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_memory_budget import abstract_params

import natgalore_jax as ng
from benchmarks.common.result_files import read_results, read_suite
from benchmarks.finetuning import grids
from benchmarks.pretraining.report import fill
from benchmarks.pretraining.run_spec import ROOT as RUNS
from benchmarks.pretraining.summary import summarise
from benchmarks.pretraining.tables import short
from benchmarks.pretraining.tuning import rates_of, tuned_rates
from examples.llama.model.config import MODEL_PRESETS

ROOT = Path(__file__).parent.parent
README = ROOT.joinpath("README.md").read_text()
WORDS = " ".join(README.split())
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def groups():
    return summarise(read_results(RUNS, "main"))


def test_at_most_700_words():
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    assert len([word for word in prose.split() if re.search(r"\w", word)]) <= 700


def test_the_table_is_that_of_the_report(groups):
    assert fill(README, short(groups, "docs/quality.md")) == README


def test_losses_and_bytes(groups):
    rows = [
        {method: row for (method, _), row in groups[run].items()}
        for run in (("nano", "shakespeare"), ("nano", "sotu"), ("9m", "sotu"))
    ]

    def distances(adamw, method):
        """Test loss of AdamW minus that of the method, of each run."""
        return [f"{of[adamw].test - of[method].test:.2f}" for of in rows]

    first, second, third = distances("adamw-clipped", "natural-galore")
    assert f"the default ends {first} and {second} nats below AdamW with two tuned rates" in WORDS
    assert f"(1.07 M parameters), {third} at 9 M" in WORDS
    unclipped = distances("adamw", "natural-galore")
    assert "{}, {} and {} without that clipping".format(*unclipped) in WORDS
    share = rows[0]["natural-galore-lean"].state_bytes / rows[0]["adamw"].state_bytes
    lean = " and ".join(distances("adamw-clipped", "natural-galore-lean")[:2])
    fira = [f"{of['fira-clipped'].test - of['natural-galore'].test:.2f}" for of in rows[:2]]
    assert "with it Fira ends {} and {} above the default".format(*fira) in WORDS
    earlier = summarise(read_results(RUNS, "one-iteration"), read_results(RUNS, "main"))
    small = []
    for of, text in zip(rows, ("shakespeare", "sotu"), strict=False):
        others = [row.test for (name, _), row in earlier["nano", text].items() if "scale" in name]
        lean_loss = of["natural-galore-lean"].test
        small.append(min(of["scale-clipped"].test, *others) - lean_loss)
    of_adamw = rows[0]["scale-clipped"].state_bytes / rows[0]["adamw"].state_bytes
    scale = "SCALE at {:.0f} % of AdamW's state {:.2f} and {:.2f} above lean"
    assert scale.format(100 * of_adamw, *small) in WORDS
    assert f"has {100 * share:.1f} % of AdamW's bytes" in WORDS
    assert f"AdamW's bytes and ends {lean} below its loss with clipping" in WORDS


def test_scale_and_racs_at_9m(groups):
    of = {method: row for (method, _), row in groups["9m", "sotu"].items()}
    scale, clipped, racs = (of[name] for name in ("scale", "scale-clipped", "racs"))
    lean = of["natural-galore-lean"]
    above = clipped.test - lean.test
    share = clipped.state_bytes / of["adamw"].state_bytes
    at_9m = f"{above:.2f} with {100 * share:.0f} % at 9 M"
    assert f"(the better of two pairs of rates), {at_9m}" in WORDS
    page = " ".join((ROOT / "docs/experiments.md").read_text().split())
    lower = f"SCALE ends {scale.test - clipped.test:.3f} lower with it ({clipped.test:.3f} ±"
    assert f"{lower} {clipped.test_std:.3f} at 0.00125 × 16), {above:.3f} above lean" in page
    assert f"with {clipped.state_bytes / lean.state_bytes:.2f} times its state" in page
    assert f"RACS without it has AdamW's loss ({racs.test:.3f} ± {racs.test_std:.3f})" in page


def test_a_step_of_llama_7b():
    steps = json.loads((RESULTS / "gpu_memory_a100_256_tokens.json").read_text())["steps"]
    size = {
        s["method"]: f"{s['compiled_for_a100_bytes']['total'] / 1e9:.1f} GB"
        for s in steps
        if s["step"] == "per layer"
    }
    lean = "lean-natural-galore@rank=16"
    assert f"{size[lean]} instead of {size['adamw']} with AdamW" in WORDS
    assert f"with weights in 8 bits {size[f'{lean},weight_bits=8']}" in WORDS


def test_fine_tuning():
    of = {"adamw": [], "natural-galore-r8": [], "lora-r8": []}
    for r in grids.after_tuning(read_suite(RESULTS / "glue", "main")):
        of[r["method"]].append(r)
    assert all(len(seeds) >= 8 for seeds in of.values())
    bytes_of = {method: seeds[0]["optimizer_bytes"] for method, seeds in of.items()}
    share = bytes_of["natural-galore-r8"] / bytes_of["adamw"]
    assert f"has AdamW's test accuracy with {100 * share:.1f} % of its state" in WORDS
    accuracy = {
        method: {r["seed"]: 100 * r["metrics"]["test"]["accuracy"] for r in seeds}
        for method, seeds in of.items()
    }
    page = " ".join((ROOT / "docs/finetuning.md").read_text().split())
    ours = accuracy["natural-galore-r8"]
    below, above = (
        [sign * (ours[s] - accuracy[other][s]) for s in ours]
        for sign, other in ((-1, "adamw"), (1, "lora-r8"))
    )
    shown = [f"{statistics.mean(d):.1f} ± {statistics.stdev(d):.1f}" for d in (below, above)]
    assert "it is {} points below AdamW and {} above LoRA".format(*shown) in page


def test_rates_that_do_not_carry_over():
    rates = tuned_rates(read_results(RUNS, "tune"), "nano")["natural-galore"].rates
    losses = {
        r["method"]: r["test_loss"]
        for r in read_results(RUNS, "several-values")
        if r["preset"] == "9m" and rates_of(r) == rates
    }
    one, four = losses["natural-galore"], losses["recipe@singular_values=4"]
    assert f"at its best rates of 1 M parameters the default has [{one:.2f} at 9 M]" in WORDS
    assert f"{four:.2f} with four singular values clipped" in WORDS


@pytest.mark.parametrize(
    ("file", "rank"), [("step_time_rank_32.json", 32), ("step_time.json", 128)]
)
def test_time_of_an_update(file, rank):
    methods = json.loads((RESULTS / file).read_text())["methods"]
    ours, adamw = (methods[m]["amortised_s"] for m in ("natural", "adamw"))
    assert re.search(rf"at rank {rank} (takes )?{ours / adamw:.2f} times", WORDS)


STATES = {
    "`ng.natural_galore_adamw`": (ng.natural_galore_adamw, 4, {}),
    "the same with `moment_bits=8`": (ng.natural_galore_adamw, 4, {"moment_bits": 8}),
    "`ng.lean_natural_galore_adamw`": (ng.lean_natural_galore_adamw, 16, {}),
}


@pytest.mark.parametrize("name", STATES)
def test_state_at_1b_and_7b(name):
    factory, share, settings = STATES[name]
    cells = next(line for line in README.splitlines() if line.startswith(f"| {name}")).split("|")
    for preset, cell in zip(("1b", "7b"), cells[3:5], strict=True):
        params = abstract_params(preset)
        tx = factory(1e-2, rank=MODEL_PRESETS[preset].hidden // share, **settings)
        report = ng.memory_report(tx, params)
        assert f"{report.total_state_bytes / 1e9:.2f}" == cell.strip()
        assert f"{report.adamw_state_bytes / 1e9:.2f} |" in README


def test_the_training_step_runs():
    block = re.search(r"```python\n(import jax, jax.*?)```", README, re.S)
    namespace = {}
    exec(block[1], namespace)
    assert jnp.isfinite(namespace["loss"])
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), namespace["params"]))
