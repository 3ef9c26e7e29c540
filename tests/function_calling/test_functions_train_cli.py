"""The program as users start it: files, exit codes, and errors of one line."""

import json
import signal

import pytest
import tiny_planner as tiny
from command_lines import Stops, assert_one_line
from rich.console import Console
from safetensors.numpy import load_file

from examples.finetune.planner.__main__ import main
from examples.finetune.planner.data import load_tinyagent
from examples.finetune.planner.methods import MethodConfig, check_methods
from examples.finetune.planner.plans.metrics import verdict
from examples.finetune.planner.predictions import side_by_side
from examples.llama.model.config import MODEL_PRESETS

PLANNER = "examples.finetune.planner.__main__"
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("planner")


@pytest.fixture(scope="module")
def command(directory):
    """Options for a short run."""
    return tiny.command_line(directory)


def test_plans_are_shown_whole_and_without_what_a_terminal_would_obey(tmp_path):
    address = "recipients=['somebody.with.a.long.name@example.org']"
    row = dict.fromkeys(("prompt", "reference", "verdict"), address)
    for name in ("untrained", "lora"):
        (tmp_path / name).mkdir()
        written = json.dumps([{**row, "id": "1", "written": f"\x1b[2J{address}"}])
        (tmp_path / name / "predictions.json").write_text(written)
    with (console := Console(width=40)).capture() as captured:
        console.print(side_by_side(tmp_path, ("untrained", "lora"), 1))
    assert "\x1b" not in captured.get() and "…" not in captured.get()
    assert captured.get().count("'") == 2 * 6  # The prompt, the reference, two plans and verdicts.


def test_it_has_a_pulse(command, directory, tmp_path, capsys, monkeypatch):
    """A run that is told to stop, goes on, and ends with everything that belongs to it."""
    arguments = [*command, "--root", str(tmp_path), "--name", "run", "--methods"]
    arguments += ["lora", "galore", "--limit", "8", "--eval-limit", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(f"{PLANNER}.make_reporter", lambda *_: Stops())
        assert main(arguments) == 128 + signal.SIGTERM
    assert "lora: stopped at step 3, saved; --resume" in capsys.readouterr().out
    assert main([*arguments, "--quiet"]) == 1
    assert_one_line(capsys, "already has a run")

    assert main([*arguments, "--resume"]) == 0
    output, run = capsys.readouterr().out, tmp_path / "run"
    assert "train: 8 records" in output and "untrained: validation loss" in output
    assert f"plans of the test split in {run}/METHOD/predictions.md" in " ".join(output.split())
    # The plans of one question, before training and after it.
    (shown,) = json.loads((run / "untrained" / "predictions.json").read_text())
    position = output.index(shown["id"])
    for name in ("reference", "untrained", "lora", "galore"):
        position = output.index(f"\n{name} ", position)
    assert f"Question: {shown['question']}\n" in output
    assert "\x1b" not in output  # No terminal, no colours and no progress bar.
    summary = json.loads((run / "summary.json").read_text())
    assert summary["records"] == {"train": 8, "validation": 1, "test": 1}
    assert (run / "curves.png").stat().st_size > 1000
    tensors = load_file(directory / "model" / "model.safetensors")
    for method in summary["methods"]:
        files = run / method["method"]
        assert json.loads((files / "summary.json").read_text()) == method
        assert method["steps"] == 4
        assert method["test"]["metrics"].keys() == summary["untrained"]["test"]["metrics"].keys()
        # LoRA is merged.
        assert load_file(files / "model" / "model.safetensors").keys() == tensors.keys()
        text = (files / "predictions.md").read_text()
        assert "| question | reference | written | verdict |" in text
        assert "&lt;END_OF_PLAN>" in text
    lora, galore = summary["methods"]
    trained = [method["trained_parameters"] for method in (lora, galore)]
    assert 0 < trained[0] < trained[1] < lora["parameters"] == galore["parameters"]
    # Another evaluation before training would take minutes before the method refuses to go on.
    before = (run / "untrained.json").read_text()
    assert main([*arguments, "--resume", "--quiet", "--new-tokens", "5"]) == 1
    assert_one_line(capsys, "run was made with another configuration: new_tokens: 6 -> 5")
    # What changed, and not the rows that follow from it.
    for option, changed in (
        ("--negatives", "prompt.negatives: 1 -> 2"),
        ("--eval-limit", "eval_limit: 1 -> 2"),
    ):
        assert main([*arguments, "--resume", "--quiet", option, "2"]) == 1
        error = capsys.readouterr().err
        assert error == f"error: {run} was made with another configuration: {changed}\n"
    assert (run / "untrained.json").read_text() == before
    # The model that was written can be trained further.
    again = ["--model", str(run / "lora" / "model"), "--name", "again", "--epochs", "1", "--quiet"]
    assert main([*arguments, *again, "--methods", "lora"]) == 0
    assert main([*arguments, *again[:2], "--overwrite"]) == 1
    assert "--overwrite would delete --model" in capsys.readouterr().err
    # A signal during the evaluation before training, which is the beginning of a run.
    with monkeypatch.context() as patch:
        patch.setattr(f"{PLANNER}.evaluate_untrained", lambda *given: given[-1]._set(15))
        assert main([*arguments, "--overwrite", "--quiet"]) == 128 + signal.SIGTERM
    assert "stopped before the training" in capsys.readouterr().out
    assert (run / "lora" / "model").is_dir()
    assert main([*arguments[:-6], "lora", *arguments[-4:], "--overwrite", "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "run"]
    assert not (run / "galore").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "./nowhere"], "./nowhere: no such directory"),
        (["--data", "nowhere.json"], "nowhere.json: No such file"),
        (["--max-length", "12"], "max_length=12: no row of the train split is that short"),
        (["--max-length", "598"], "max_length=598 and new_tokens=6 together are above the 600"),
        (["--methods", "adamw", "adamw"], "methods must name each method once"),
        (["--parts", "sgd"], "parts: no part is called 'sgd'; there are none"),
        (["--resume", "--overwrite"], "--overwrite"),
        (["--scale", "0", "--methods", "adamw", "lora"], "scale must be above 0 for lora"),
        (["--warmup", "2"], "warmup must be at least 0 and at most 1, got 2"),
        (
            ["--learning-rate", "1e30", "--methods", "adamw"],
            "adamw: the result of an update is not finite at",
        ),
    ],
)
def test_errors_are_one_line(command, tmp_path, capsys, more, message):
    short = ["--root", str(tmp_path), "--quiet", "--limit", "8", "--eval-limit", "1"]
    assert main([*command, *short, "--methods", "galore", *more]) == 1
    assert_one_line(capsys, message)


def test_a_rank_is_refused_before_records_are_read(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "examples.finetune.planner.prepare.load_dataset", lambda *_: pytest.fail("they were read")
    )
    assert main([*command, f"--root={tmp_path}", "--quiet", "--methods=galore", "--rank=8"]) == 1
    assert_one_line(capsys, "rank must be below the smallest side of the matrices, 8; got 8")


def test_adamw_has_no_rank_to_refuse():
    check_methods(["adamw"], MethodConfig(rank=10**6), MODEL_PRESETS["nano"])


def test_a_plan_with_an_unknown_tool(command, directory, tmp_path, capsys):
    records = json.loads((directory / "records.json").read_text())
    records["r3"]["output"][0]["parsed_output"][0]["tool_name"] = "fly"
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    assert main([*command, "--quiet", "--data", str(path)]) == 1
    message = "'r3': call 1: unknown tool fly: --skip-unusable leaves out such records"
    assert_one_line(capsys, f"{path}: {message}")
    path.write_text(json.dumps({"r1": records["r1"]}))
    assert main([*command, "--quiet", "--data", str(path)]) == 1
    assert_one_line(capsys, "by their tools: give more records, or a larger --held-out")


def test_a_verdict_says_what_is_wrong(directory):
    records = load_tinyagent(tiny.write_records(directory / "records.json"))
    record = next(r for r in records if r.plan.tools == ("open_and_get_file_path", "summarize_pdf"))

    def said(text):
        return verdict(record, text)

    first = '1. open_and_get_file_path("tax.pdf")\n'
    assert said(f'{first}2. summarize_pdf("$1")\n3. join()') == "right"
    assert said("sorry").startswith("no plan: ")
    assert said(f'{first}2. summarize_pdf("$1")') == "join is missing"
    assert said(f"{first}2. open_note('a')\n3. join()") == (
        "tools missing: summarize_pdf; tools too many: open_note"
    )
    assert said(f'{first}2. summarize_pdf("tax.pdf")\n3. join()') == (
        "dependencies missing: open_and_get_file_path -> summarize_pdf"
    )
    assert said('1. open_and_get_file_path("b.pdf")\n2. summarize_pdf("$1")\n3. join()') == (
        "arguments of call 1, open_and_get_file_path: file_name"
    )
