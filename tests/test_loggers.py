"""Metrics in TensorBoard and Weights & Biases, by stand-ins for their packages."""

import contextlib
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from examples.common.config import write_json
from examples.common.errors import ConfigError
from examples.common.loggers import make_loggers, scalars
from examples.common.metrics import MetricsLog, read_metrics

RECORDS = [
    {"kind": "train", "step": 3, "loss": 2.5, "tokens_per_second": 10.0},
    {"kind": "validation", "step": 3, "loss": 2.0, "metrics": {"f1": 0.5, "task": "own"}},
]
NUMBERS = [
    {"train/loss": 2.5, "train/tokens_per_second": 10.0},
    {"validation/loss": 2.0, "validation/f1": 0.5},
]


@pytest.fixture
def calls(monkeypatch):
    """Calls of the stand-ins."""
    calls = []

    def said(name):
        return lambda *args, **kwargs: calls.append((name, *args, *kwargs.items()))

    def writer(directory, purge_step, filename_suffix):
        calls.append(("open", directory, purge_step, filename_suffix))
        return SimpleNamespace(add_scalar=said("scalar"), close=said("close"))

    def init(**options):
        calls.append(("init", options))
        return SimpleNamespace(define_metric=said("axis"), log=said("log"), finish=said("finish"))

    for name, functions in (("tensorboardX", {"SummaryWriter": writer}), ("wandb", {"init": init})):
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def write(run_dir, name, step=0):
    loggers = make_loggers([name], run_dir, {"rank": 4})
    with MetricsLog(run_dir / "metrics.jsonl", loggers=loggers) as log:
        log.rewind(step)
        for record in RECORDS:
            log.write(**record)


def test_numbers_have_the_kind_of_their_record():
    assert [scalars(record) for record in RECORDS] == NUMBERS


def test_tensorboard(tmp_path, calls):
    write(tmp_path, "tensorboard")
    values = [("scalar", *item, 3) for numbers in NUMBERS for item in numbers.items()]
    assert calls == [("open", str(tmp_path / "tensorboard"), 0, ".1"), *values, ("close",)]
    assert read_metrics(tmp_path / "metrics.jsonl") == RECORDS
    write(tmp_path, "tensorboard", step=2)
    assert ("open", str(tmp_path / "tensorboard"), 3, ".1") in calls


def test_tensorboard_forgets_the_steps_before_a_rollback(tmp_path, calls):
    loggers = make_loggers(["tensorboard"], tmp_path, {})
    with MetricsLog(tmp_path / "metrics.jsonl", loggers=loggers) as log:
        log.rewind(0)
        for step in (1, 2, 3):
            log.write(kind="train", step=step, loss=1.0)
        log.rewind(1)
        log.write(kind="train", step=2, loss=0.5)
    opened = [call[2:] for call in calls if call[0] == "open"]
    assert opened == [(0, ".1"), (2, ".2")]


@pytest.mark.parametrize("how", ["finished", "diverged", "error"])
def test_wandb_is_told_of_a_failure(tmp_path, calls, how):
    with (
        contextlib.suppress(ZeroDivisionError),
        MetricsLog(loggers=make_loggers(["wandb"], tmp_path, {})) as log,
    ):
        log.failed = how == "diverged"
        if how == "error":
            raise ZeroDivisionError
    assert calls[-1] == ("finish", ("exit_code", int(how != "finished")))


def test_numbers_that_json_has_not_are_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.rewind(0)
        log.write(kind="train", step=1, loss=math.nan, of={"perplexity": [math.inf, 2.0]})
    text = '{"kind": "train", "step": 1, "loss": null, "of": {"perplexity": [null, 2.0]}}\n'
    assert path.read_text() == text
    (record,) = read_metrics(path)
    assert record["step"] == 1 and math.isnan(record["loss"])
    write_json(path, record)
    assert path.read_text() == json.dumps(json.loads(text), indent=2) + "\n"


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path, calls):
    for _ in range(2):
        write(tmp_path, "wandb")
    (first, second) = [call[1] for call in calls if call[0] == "init"]
    assert first == second and first["resume"] == "allow"
    assert (first["name"], first["config"]) == (tmp_path.name, {"rank": 4})
    logged = [call[1] for call in calls if call[0] == "log"]
    assert logged == 2 * [{**numbers, "step": 3} for numbers in NUMBERS]
    assert calls[-1] == ("finish", ("exit_code", 0))
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "wandb")
    *_, other = [call[1] for call in calls if call[0] == "init"]
    assert other["id"] != first["id"]


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigError, match=f"--log-to {name} needs the package {package} .*pip install"
    ):
        make_loggers([name], tmp_path, {})


def test_a_wandb_that_does_not_start_is_named(tmp_path, calls, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured\nrun wandb login")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(ConfigError, match=r"--log-to wandb: it cannot start .*api_key"):
        make_loggers(["wandb"], tmp_path, {})
