"""Tables of programs fit a terminal of 80 columns: nothing is cut off."""

import io

import pytest
from rich.console import Console

from examples.finetune.encoder import report as encoder
from examples.finetune.encoder.methods import LEARNING_RATES
from examples.finetune.planner import report as planner
from examples.llama.memory.step_memory import StepMemory
from examples.llama.plan.candidates import Candidate
from examples.llama.plan.planner import Row, plan_table
from examples.llama.run_config import run_preset

COSTS = {
    "learning_rate": 3.5e-4,
    "trained_parameters": 124_645_632,
    "optimizer_bytes": 2**30,
    "seconds": 12_345.0,
    "best_epoch": 3.0,
}


def printed(table):
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    return text


@pytest.mark.parametrize(
    ("splits", "names"),
    [
        (("validation", "test"), ("pearson", "spearman")),
        (("validation_matched", "validation_mismatched"), ("accuracy", "f1")),
    ],
)
def test_scores_of_encoders(splits, names):
    metrics = {split: dict.fromkeys(names, 0.9123) for split in splits}
    methods = [{"method": name, "metrics": metrics, **COSTS} for name in LEARNING_RATES]
    summary = {"task": "own-regression", "model": "FacebookAI/roberta-base", "methods": methods}
    text = printed(encoder.summary_table({**summary, "baseline": metrics}))
    assert text.count("91.2") == 4 * (len(methods) + 1)
    assert text.count("1024.00") == len(methods)


def test_scores_of_planners():
    metrics = dict.fromkeys(("parsed", "success", "aware_success"), 1.0)
    metrics |= dict.fromkeys(("tool_precision", "tool_recall"), 0.9123)
    test = {"loss": 1.234, "metrics": metrics, "seconds_per_plan": 123.4}
    methods = [{"method": name, "test": test, **COSTS} for name in LEARNING_RATES]
    summary = {"dataset": "nestful", "model": "smollm2-135m-instruct", "methods": methods}
    text = printed(planner.summary_table({**summary, "untrained": {"test": test}}))
    assert text.count("100.0") == 3 * (len(methods) + 1)
    assert text.count("123.4") == len(methods) + 1


def test_a_plan():
    """Large numbers, and a setting that was not compiled."""
    size = 123_456_000_000
    state = {"basis": size, "history": size, "inner": size, "other": size}
    temporary = {"gradients": size, "activations": size, "update": size}
    memory = StepMemory(size, state, size, temporary)
    config = run_preset("7b")
    optimizer = "natural-galore@moment_bits=8,basis_dtype=bfloat16"
    candidate = Candidate(optimizer, "per layer", ("--optimizer", "natural-galore"), config)
    rows = [Row(candidate, memory, compiled) for compiled in (True, False)]
    text = printed(plan_table("7b: 900.50 GB, 500.00 MB of it reserved", rows, 900_000_000_000))
    assert text.count("123.46") == 2 * 6 + 1 and "≥ 1111.10" in text and "?" in text
