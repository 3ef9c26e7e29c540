"""The program as users start it: files, exit codes, and errors of one line."""

import json
import signal

import pytest
import tiny_encoder as tiny
from command_lines import Stops, assert_one_line
from safetensors.numpy import load_file, save_file

from examples.common.errors import ConfigError, DataError
from examples.common.reporter import Reporter
from examples.finetune.encoder.__main__ import main, parse
from examples.finetune.encoder.data import TASKS
from examples.finetune.encoder.data.snippets import read_archive
from examples.finetune.encoder.run_config import preset_config
from examples.finetune.encoder.sweep import Outcome, best_outcomes

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def arguments(tmp_path):
    """Options for a short run, with all files in a directory of the test."""
    rows = tiny.write_rows(tmp_path / "rows", {"train": 24, "dev": 10})
    tensors = {k: v for k, v in tiny.weights("bert").items() if not k.startswith("classifier")}
    model = tiny.write_model(tmp_path / "model", tensors=tensors)
    options = {
        "task": "own",
        "data": rows,
        "model": model,
        "root": tmp_path / "runs",
        "name": "test",
        "batch-size": 8,
        "max-length": 8,
        "epochs": 2,
        "rank": 2,
        "interval": 2,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_it_has_a_pulse(arguments, tmp_path, capsys, monkeypatch):
    """A run that is told to stop, goes on, and ends with everything that belongs to it."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "examples.finetune.encoder.__main__.make_reporter", lambda *_: Stops("validation")
        )
        assert main(arguments) == 128 + signal.SIGTERM
    # Asked after the next step, which is saved.
    assert "adamw: stopped at step 4, saved; --resume" in capsys.readouterr().out
    assert main([*arguments, "--quiet"]) == 1
    assert_one_line(capsys, "already has a run")

    assert main([*arguments, "--resume"]) == 0
    output = capsys.readouterr().out
    assert "train: " in output and " of 24 rows cut to 8 tokens" in output
    assert "new, with random values: classifier.bias, classifier.weight" in output
    assert "tf-idf" in output
    assert "\x1b" not in output  # No terminal, no colours and no progress bar.
    run = tmp_path / "runs" / "test"
    summary = json.loads((run / "summary.json").read_text())
    assert [m["method"] for m in summary["methods"]] == ["adamw", "natural-galore"]
    assert summary["rows"] == {"train": 24, "validation": 10}
    assert summary["truncated"]["train"] > 0
    assert summary["baseline"]["validation"]["accuracy"] == 1.0
    for method in summary["methods"]:
        files = run / method["method"]
        assert json.loads((files / "summary.json").read_text()) == method
        assert method["steps"] == 6
        assert (
            load_file(files / "model" / "model.safetensors").keys() == tiny.weights("bert").keys()
        )
        assert (files / "model" / "tokenizer.json").exists()
    # The model that was written can be trained further.
    again = ["--model", str(run / "adamw" / "model"), "--name", "again", "--epochs", "1"]
    assert main([*arguments, *again, "--methods", "adamw", "--quiet", "--no-save-model"]) == 0
    assert not (tmp_path / "runs" / "again" / "adamw" / "model").exists()
    capsys.readouterr()
    assert main([*arguments, *again[:2], "--overwrite", "--quiet"]) == 1
    assert_one_line(capsys, "--overwrite would delete --model")
    assert (run / "adamw" / "model").is_dir()
    # It is found while the first method is set up.
    assert main([*arguments, "--overwrite", "--quiet", "--rank", "16"]) == 1
    assert_one_line(capsys, "rank must be below")
    assert (run / "adamw" / "model").is_dir()
    assert main([*arguments, "--overwrite", "--quiet", "--methods", "lora"]) == 0
    assert sorted(path.name for path in run.parent.iterdir()) == ["again", "test"]
    assert sorted(path.name for path in run.iterdir()) == ["lora", "summary.json"]


def test_the_baseline_is_announced_and_loses_no_summary(arguments, tmp_path, monkeypatch):
    reporter = Reporter()

    def interrupted(*_):
        assert reporter.activity.name == "fitting the tf-idf baseline"
        raise KeyboardInterrupt

    program = "examples.finetune.encoder.__main__"
    monkeypatch.setattr(f"{program}.make_reporter", lambda *_: reporter)
    monkeypatch.setattr(f"{program}.baseline_scores", interrupted)
    assert main([*arguments, "--methods", "adamw", "--epochs", "1"]) == 128 + signal.SIGINT
    summary = json.loads((tmp_path / "runs" / "test" / "summary.json").read_text())
    assert [method["steps"] for method in summary["methods"]] == [3]
    assert summary["baseline"] is None


def test_a_sweep_goes_on_and_predicts(arguments, tmp_path, capsys, monkeypatch):
    """A rate that learns, stopped in the middle, and one that diverges."""
    names = ("no", "yes")
    tiny.write_rows(tmp_path / "rows", {"train": 24, "dev": 10, "test": 5}, names.__getitem__)
    sweep = [*arguments, "--methods", "adamw", "--sweep-learning-rates", "1e30", "0.02"]
    sweep += ["--predict", "--eval-batches", "1"]

    with monkeypatch.context() as patch:
        patch.setattr("examples.finetune.encoder.__main__.make_reporter", lambda *_: Stops())
        assert main(sweep) == 128 + signal.SIGTERM
    assert "adamw-lr0.02: stopped at step 3, saved; --resume goes on" in capsys.readouterr().out
    assert main([*sweep, "--resume"]) == 0
    output = capsys.readouterr().out
    assert "the loss is not finite at step" in output and "by the validation rows" in output
    run = tmp_path / "runs" / "test"
    assert f"labels of test rows in {run}/METHOD-lrRATE/predictions" in output.replace("\n", "")
    summary = json.loads((run / "summary.json").read_text())
    assert [method["learning_rate"] for method in summary["methods"]] == [0.02]
    assert [(r["run"], r["diverged"], r["best"]) for r in summary["sweep"]] == [
        ("adamw-lr0.02", False, True),
        ("adamw-lr1e+30", True, False),
    ]
    assert summary["rows"] == {"train": 24, "validation": 8}
    written = (run / "adamw-lr0.02" / "predictions" / "predictions.tsv").read_text()
    lines = [line.split("\t") for line in written.splitlines()]
    assert lines[0] == ["index", "prediction"]
    assert [index for index, _ in lines[1:]] == ["0", "1", "2", "3", "4"]
    assert {label for _, label in lines[1:]} <= set(names)


def test_a_signal_after_the_last_step_of_a_sweep_counts(arguments, capsys, monkeypatch):
    sweep = [*arguments, "--methods", "adamw", "--sweep-learning-rates", "0.02"]
    with monkeypatch.context() as patch:
        last = Stops("validation", step=6)
        patch.setattr("examples.finetune.encoder.__main__.make_reporter", lambda *_: last)
        assert main(sweep) == 128 + signal.SIGTERM
    assert "adamw-lr0.02: stopped at step 6, saved; --resume goes on" in capsys.readouterr().out
    assert main([*sweep, "--resume"]) == 0


def test_the_best_rate_of_a_sweep():
    def outcome(method, rate, accuracy, loss):
        summary = {
            "metrics": {"validation": {"accuracy": accuracy}},
            "losses": {"validation": loss},
        }
        return Outcome(method, rate, None if accuracy is None else summary)

    task = TASKS["sst2"]
    lora = [outcome("lora", 1e-4, 0.8, 0.2), outcome("lora", 1e-3, None, None)]
    # The metric counts first, then the loss.
    scores = ((0.8, 0.1), (0.9, 0.4), (0.9, 0.3), (None, None))
    adamw = [outcome("adamw", 1e-5 * k, *pair) for k, pair in enumerate(scores, start=1)]
    best = best_outcomes([*adamw, *lora], task)
    assert [one.name for one in best] == ["adamw-lr3e-05", "lora-lr0.0001"]
    # A method without a usable rate costs the others nothing.
    assert best_outcomes([*adamw, lora[1]], task) == best[:1]
    with pytest.raises(ConfigError, match="adamw, lora: the loss is not finite at any rate"):
        best_outcomes([adamw[3], lora[1]], task)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval-batches", "0"], "eval_batches must be at least 1 and"),
        (
            ["--sweep-learning-rates", "1e-4", "1e-4"],
            "must be positive, finite and different",
        ),
        (
            ["--sweep-learning-rates", "1e-3", "1.0000001e-3"],
            "in six digits, got 0.001 0",
        ),
        (["--sweep-learning-rates", "1", "--learning-rate", "1"], "not both"),
        (["--predict"], "the test split is missing (none of test.tsv, test.jsonl, test.csv)"),
        (["--model", "./nowhere"], "./nowhere: no such directory"),
        (["--data", "nowhere"], "nowhere: no such directory"),
        (["--task", "sst2"], 'train.jsonl: line 1: expected a string "sentence"'),
        (["--max-length", "64"], "max_length=64: "),
        (["--max-length", "2"], "max_length must be at least 8"),
        (["--rank", "16"], "rank must be below the smallest side of the matrices, 16"),
        (["--targets", "keys"], "no matrix is called 'keys'"),
        (["--methods", "adamw", "adamw"], "methods must name each method once"),
        (["--methods"], "methods must name at least one method, got none"),
        (["--resume", "--overwrite"], "--overwrite"),
        (["--scale", "0", "--methods", "lora"], "scale must be above 0 for lora"),
        (["--root", "/dev/null"], "/dev/null"),
        (["--name", "a[1]"], "a[1]/adamw/checkpoints: Orbax writes no readable checkpoints"),
        (["--warmup", "2"], "warmup must be at least 0 and at most 1, got 2"),
        (["--clip-norm", "nan"], "clip_norm must be above 0 and less than inf, got nan"),
        (["--sweep-learning-rates", "inf"], "must be positive, finite and different"),
    ],
)
def test_errors_are_one_line(arguments, capsys, more, message):
    assert main([*arguments, "--quiet", *more]) == 1
    assert_one_line(capsys, message)


def test_weights_for_other_classes(arguments, tmp_path, capsys):
    path = tmp_path / "model" / "model.safetensors"
    save_file(tiny.weights("bert"), path)
    assert main([*arguments, "--quiet"]) == 1
    message = "classifier.weight is (3, 16), expected (2, 16); pass --new-head for other classes"
    assert_one_line(capsys, message)
    path.write_bytes(path.read_bytes()[:1000])
    assert main([*arguments, "--quiet", "--new-head"]) == 1
    assert_one_line(capsys, "model.safetensors: not a complete safetensors file")


def test_a_preset_fills_what_is_not_given():
    assert parse([]) == preset_config("default", "movie-snippets")
    config = parse(["--preset", "galore-rank-8", "--task", "rte", "--batch-size", "4"])
    assert (config.batch_size, config.epochs, config.method.rank) == (4, 30, 8)
    assert config.run_dir.name == "rte-galore-rank-8"
    sweep = ["--preset", "natural-galore-rank-4", "--task", "rte", "--sweep-learning-rates", "1e-5"]
    assert parse(sweep).sweep_learning_rates == (1e-5,)
    with pytest.raises(ConfigError, match="not both"):
        parse([*sweep, "--learning-rate", "1e-4"])
    with pytest.raises(SystemExit):
        parse(["--preset", "galore"])


def test_a_directory_for_a_task_that_reads_none(tmp_path):
    with pytest.raises(DataError, match="for rows of your own pass --task own"):
        read_archive(tmp_path)
