"""The program as users start it: files, exit codes, and errors of one line."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from examples.common.checkpoints import Checkpoints
from examples.common.metrics import of_kind, read_metrics
from examples.llama.__main__ import main, parse
from examples.llama.run_config import run_preset

pytestmark = pytest.mark.usefixtures("fast_compile")

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.hidden": 16,
    "model.intermediate": 24,
    "model.layers": 2,
    "model.heads": 2,
    "model.kv-heads": 1,
    "vocab-size": 280,
    "seq-len": 16,
    "batch-size": 2,
    "rank": 4,
}


@pytest.fixture
def arguments(tmp_path):
    """Options for a run on a small text, with all files in a directory of the test."""
    words = random.Random(0).choices(["we", "the", "people", "of", "more", "perfect"], k=2000)
    rows = [{"text": " ".join(words[i : i + 20])} for i in range(0, len(words), 20)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = ["--root", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return ["--data", str(text), "--name", "test", *places, *sizes, "--model.stacked"]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "examples.llama", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_it_has_a_pulse(arguments, tmp_path):
    steps = ["--steps", "6", "--eval-every", "3", "--accumulate", "2", "--interval", "3"]
    program = start([*arguments, *steps])
    output, errors = program.communicate()
    assert program.returncode == 0, errors
    assert "bigram" in output
    assert len(output.splitlines()) < 50
    assert "\x1b" not in output  # No terminal, no colours and no progress bar.

    run = tmp_path / "runs" / "test"
    summary = json.loads((run / "summary.json").read_text())
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in of_kind(records, "train")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in of_kind(records, "validation")] == [3, 6]
    assert summary["test"]["model"] == of_kind(records, "test")[-1]["perplexity"]
    assert 1 < summary["validation"]["bigram"] < summary["validation"]["unigram"]
    assert summary["tokens"] == 6 * 2 * 2 * 16
    assert summary["adamw_bytes"] > 8 * summary["parameters"]
    assert json.loads((run / "config.json").read_text())["optimizer"]["rank"] == 4
    assert (run / "sample.txt").read_text().startswith("My fellow citizens,")
    image = matplotlib.image.imread(run / "curves.png")
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(arguments, tmp_path, number):
    program = start([*arguments, "--steps", "100000", "--optimizer", "adamw"])
    run = tmp_path / "runs" / "test"
    while program.poll() is None and len(read_metrics(run / "metrics.jsonl")) < 3:
        time.sleep(0.05)
    program.send_signal(number)
    output, errors = program.communicate()

    assert program.returncode == 128 + number, errors
    assert "--resume" in output
    assert "Traceback" not in errors
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.latest() == last < 100000


@pytest.mark.slow
def test_resume_and_overwrite(arguments, tmp_path, capsys):
    adamw = [*arguments, "--optimizer", "adamw", "--steps", "2", "--quiet"]
    assert main(adamw) == 0
    metrics = tmp_path / "runs" / "test" / "metrics.jsonl"
    first = read_metrics(metrics)
    capsys.readouterr()

    assert main(adamw) == 1
    assert_one_line(capsys, "already has checkpoints")
    assert main([*adamw, "--resume", "--b2", "0.95"]) == 1
    assert_one_line(capsys, "optimizer.b2: (default) -> 0.95")
    assert main([*adamw, "--resume"]) == 0
    assert read_metrics(metrics) == first
    assert main([*adamw, "--overwrite", "--seed", "1"]) == 0
    assert read_metrics(metrics)[0]["loss"] != first[0]["loss"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--tokenizer", "nowhere.json"], "nowhere.json"),
        (["--seq-len", "10000"], "seq_len=10000"),
        (["--seq-len", "100000", "--model.max-length", "100000"], "tokens"),
        (["--rank", "64"], "rank 64"),
        (["--optimizer", "stored-gradients", "--damping", "-1"], "damping"),
        (["--model.vocab-size", "99"], "--vocab-size"),
        (["--resume", "--overwrite"], "--overwrite"),
        (["--root", "/dev/null"], "/dev/null"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--learning-rate", "1e30", "--optimizer", "adamw", "--steps", "9"], "not finite"),
    ],
)
def test_errors_are_one_line(arguments, capsys, more, message):
    assert main([*arguments, "--quiet", *more]) == 1
    assert_one_line(capsys, message)


def assert_one_line(capsys, message):
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--optimiser", "adamw"], "--optimizer"),
        (["--optimizer", "adam"], "adamw"),
        (["--rank", "many"], "many"),
        (["--model.heads", "3"], "is not a multiple of heads=3"),
    ],
)
def test_wrong_arguments_are_explained(capsys, wrong, message):
    with pytest.raises(SystemExit) as error:
        main(wrong)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_preset_fills_what_is_not_given():
    assert parse([]) == run_preset("nano")
    config = parse(["--preset", "60m", "--rank", "32"])
    assert config.model == run_preset("60m").model
    assert config.optimizer.rank == 32
    assert config.steps == 10_000


def test_help_names_the_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("natural-galore", "adafactor", "--rank", "--interval", "--resume", "exit code"):
        assert word in text
