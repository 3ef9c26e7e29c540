"""Errors of the configuration alone, before any text is read."""

import subprocess
import sys

import pytest
from cluster_run import write_text
from command_lines import assert_one_line

from examples.common.run_directory import run_directory
from examples.finetune.encoder import __main__ as encoder, prepare as encoder_inputs
from examples.finetune.planner import __main__ as planner, prepare as planner_inputs
from examples.llama import __main__ as llama
from examples.llama.data import splits

READERS = (
    (llama, splits, "load_corpus", "nano-natural-galore"),
    (encoder, encoder_inputs, "read_rows", "movie-snippets"),
    (planner, planner_inputs, "load_dataset", "nestful"),
)


@pytest.fixture(params=READERS, ids=lambda param: param[0].__name__.split(".")[-2])
def program(request, monkeypatch, tmp_path):
    """A program that fails when it reads, and its directory of runs."""
    main, module, reader, name = request.param
    monkeypatch.setattr(module, reader, lambda *_: pytest.fail("text was read"))
    return main, tmp_path / "runs" / name


def refused(program, capsys, words, message):
    main, run_dir = program
    assert main.main([f"--root={run_dir.parent}", "--quiet", *words]) == 1
    assert_one_line(capsys, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name=a[1]"], "Orbax writes no readable checkpoints"),
        (["--log-to=wandb"], "--log-to wandb needs the package wandb"),
    ],
)
def test_options(program, capsys, monkeypatch, words, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(program, capsys, words, message)


@pytest.mark.parametrize("part", ["", "lr1"])
def test_runs_in_a_directory_of_runs_are_not_overwritten(program, capsys, part):
    """Those of pre-training in another one; of a fine-tuning, whose methods are its parts, none."""
    main, run_dir = program
    parts = ["lr1"] if main is llama else [""]
    for name in {*parts, part}:
        (run_dir / name / "checkpoints" / "3").mkdir(parents=True)
    refused(program, capsys, ["--overwrite"], "--overwrite ")
    assert (run_dir / part / "checkpoints" / "3").is_dir()


def test_runs_below_a_run_are_not_overwritten(program, capsys):
    main, run_dir = program
    own = run_dir if main is llama else run_dir / "adamw"
    other = run_dir / "other" / "run"
    for path in (own, other):
        (path / "checkpoints" / "3").mkdir(parents=True)
    refused(program, capsys, ["--overwrite"], f"--overwrite would delete {other} too")


def test_what_was_killed_in_deleting_a_run_is_deleted(tmp_path):
    run_dir = tmp_path / "run"
    for path in (run_dir / "checkpoints" / "3", tmp_path / ".run.deleted" / "checkpoints"):
        path.mkdir(parents=True)
    with run_directory(run_dir, True, has_parts=False) as started:
        started()
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not [*run_dir.iterdir()]


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("planner", "networkx", "functions"), ("encoder", "sklearn", "glue")],
)
def test_a_package_that_is_missing_is_named(name, package, extra):
    program = (
        f"import sys; sys.modules[{package!r}] = None; import examples.finetune.{name}.__main__"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: needs {package}: python -m pip install -e '.[{extra}]'\n"


def test_directories_of_runs(program, capsys):
    main, run_dir = program
    part = run_dir if main is llama else run_dir / "natural-galore"
    (run_dir / "mine").mkdir(parents=True)
    refused(program, capsys, ["--overwrite"], f"--overwrite deletes a run, and {run_dir} is none")
    with run_directory(run_dir, False, has_parts=False):
        refused(program, capsys, [], f"{run_dir}: another program is training this run")
    (part / "checkpoints" / "3").mkdir(parents=True)
    refused(program, capsys, [], f"{part} already has a run: pass --resume")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank=4096", "no parameter to project at rank 4096"),
        ("--vocab-size=256", "vocab_size must be at least 257"),
        (f"--split-seed={10**64}", "split_seed must be at least 0 and less than 2147483648"),
        ("--tokenizer=nowhere.json", "nowhere.json"),
        ("--optimizer=adamw --side=left", "adamw has no side"),
        ("--optimizer=stored-gradients --damping=-1", "damping must be at least 0"),
        ("--adapter.kind=lora --adapter.rank=129", "adapter.rank=129 is larger"),
        ("--adapter.kind=factorised --init-from=x", "weights of low rank cannot start from"),
        ("--adapter.kind=relora --optimizer=galore --rank=8", "one without a subspace"),
        ("--accumulate-in-subspace --optimizer=adamw", "needs an optimizer with a subspace"),
        ("--distributed.devices --batch-size=5", "batch_size=5 must be a multiple of the number"),
    ],
)
def test_options_of_pretraining(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.setattr(splits, "load_corpus", lambda *_: pytest.fail("text was read"))
    refused((llama, tmp_path / "runs" / "a"), capsys, words.split(), message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank=4096", "got 4096"),
        ("--targets=nothing", "targets: no matrix is called 'nothing'"),
        ("--max-length=99999", "max_length=99999"),
    ],
)
def test_options_of_the_encoder(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.setattr(encoder_inputs, "read_rows", lambda *_: pytest.fail("text was read"))
    refused((encoder, tmp_path / "runs" / "a"), capsys, words.split(), message)


def test_a_path_that_is_missing_is_found_before_the_other_is_read(capsys, monkeypatch, tmp_path):
    write_text(tmp_path / "text.jsonl")
    monkeypatch.setattr("examples.llama.data.corpus.read_files", lambda *_, **__: pytest.fail())
    words = [f"--data={tmp_path / 'text.jsonl'}", "nowhere.txt"]
    refused((llama, tmp_path / "runs" / "a"), capsys, words, "nowhere.txt: no such file")
