"""The program as users start it: files, exit codes, and errors of one line."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from cluster_run import write_text
from command_lines import assert_one_line

from examples.common import cli
from examples.common.checkpoints import Checkpoints
from examples.common.errors import ConfigError
from examples.common.metrics import of_kind, read_metrics
from examples.common.run_directory import CHECKPOINTS, UNTRAINED, run_directory
from examples.finetune.encoder import __main__ as encoder
from examples.finetune.planner import __main__ as planner
from examples.llama import __main__ as llama, sample
from examples.llama.__main__ import main, parse
from examples.llama.run_config import run_preset

pytestmark = pytest.mark.usefixtures("fast_compile")

PROGRAMS = (llama, encoder, planner)
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
    text = tmp_path / "text.jsonl"
    write_text(text)
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
    # Two moments, and the sum of the gradients that are accumulated.
    assert 0 <= summary["adamw_bytes"] - 12 * summary["parameters"] < 20
    assert summary["memory"]["predicted"]["accumulated"] == 4 * summary["parameters"]
    assert json.loads((run / "config.json").read_text())["optimizer"]["rank"] == 4
    assert parse(["--config", str(run / "config.yaml")]) == parse([*arguments, *steps])
    assert (run / "sample.txt").read_text().startswith("My fellow citizens,")
    image = matplotlib.image.imread(run / "curves.png")
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 10


@pytest.mark.slow
def test_a_program_is_compiled_once(arguments, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "examples.llama", *arguments, "--optimizer", "adamw"]
    compiled = []
    for name in "first", "second":
        more = ["--steps", "2", "--name", name]
        subprocess.run([*command, *more], cwd=tmp_path, env=environment, check=True)
        compiled.append({path.name for path in (tmp_path / ".cache/jax").glob("*-cache")})
    assert compiled[0] and compiled[0] == compiled[1]


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
def test_resume_and_overwrite(arguments, tmp_path, capsys, monkeypatch):
    adamw = [*arguments, "--optimizer", "adamw", "--steps", "2", "--quiet"]
    assert main(adamw) == 0
    metrics = tmp_path / "runs" / "test" / "metrics.jsonl"
    first = read_metrics(metrics)
    capsys.readouterr()

    assert main(adamw) == 1
    assert_one_line(capsys, "already has a run")
    assert main([*adamw, "--resume", "--b2", "0.95"]) == 1
    assert_one_line(capsys, "optimizer.b2: (default) -> 0.95")
    assert main([*adamw, "--resume"]) == 0
    assert read_metrics(metrics) == first
    capsys.readouterr()
    # As if the rank was found to fit no matrix after the old run was set aside.
    monkeypatch.setattr(llama, "check_config", lambda config: None)
    assert main([*arguments, "--overwrite", "--steps", "2", "--rank", "64", "--quiet"]) == 1
    assert_one_line(capsys, "rank 64")
    assert read_metrics(metrics) == first
    assert main([*adamw, "--resume"]) == 0
    # As if a start was killed after that; the run is a link to another directory.
    elsewhere = tmp_path / "elsewhere"
    metrics.parent.rename(elsewhere)
    metrics.parent.symlink_to(elsewhere)
    shutil.move(elsewhere, tmp_path / ".elsewhere.overwritten")
    elsewhere.mkdir()
    capsys.readouterr()
    assert main([*adamw]) == 1
    assert_one_line(capsys, "already has a run")
    assert read_metrics(metrics) == first
    capsys.readouterr()
    with run_directory(metrics.parent, False, has_parts=False):
        for how in ("--resume", "--overwrite"):
            assert main([*adamw, how]) == 1
            assert_one_line(capsys, "elsewhere: another program is training this run")
    # As if a start was killed, and a run begun by another version in its place.
    shutil.copytree(elsewhere, tmp_path / ".elsewhere.overwritten")
    (tmp_path / ".elsewhere.overwritten" / "metrics.jsonl").write_text("")
    assert main([*adamw, "--resume"]) == 0
    assert read_metrics(metrics) == first and not list(tmp_path.glob(".elsewhere*"))
    assert main([*adamw, "--overwrite", "--seed", "1"]) == 0
    assert [path.name for path in metrics.parent.parent.iterdir()] == ["test"]
    assert metrics.parent.is_symlink() and not list(tmp_path.glob(".elsewhere*"))
    assert read_metrics(metrics)[0]["loss"] != first[0]["loss"]


def test_a_comparison_that_has_trained_nothing_is_overwritten(tmp_path):
    run = tmp_path / "run"
    other = run / "part" / "other" / CHECKPOINTS
    other.mkdir(parents=True)
    (run / UNTRAINED).write_text("{}")
    with (
        pytest.raises(ConfigError, match=r"--overwrite would delete .*other too"),
        run_directory(run, True, has_parts=True),
    ):
        pass
    other.rmdir()
    with run_directory(run, True, has_parts=True) as started:
        started()
    assert list(tmp_path.rglob("*")) == [run]


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
        (["--name", "."], "name must be a directory below --root, got '.'"),
        (["--name", "a/../.."], "name must be a directory below --root, got 'a/../..'"),
        (["--name", "/tmp/a"], "name must be a directory below --root, got '/tmp/a'"),
        (["--root", "/dev/null"], "/dev/null"),
        (["--name", "a[1]"], "a[1]/checkpoints: Orbax writes no readable checkpoints"),
        (["--sample", "caf\udce9"], r"'caf\udce9': arguments must be text in the encoding of the"),
        (["--learning-rate", "-1"], "learning_rate must be at least 0 and less than inf, got -1"),
        (["--clip-norm", "0"], "clip_norm must be above 0 and less than inf, got 0"),
        (["--seed", "3000000000"], "seed must be at least 0 and less than 2147483648, got 3000"),
        (["--b2", "1"], "b2 must be at least 0 and less than 1, got 1"),
        (["--warmup", "nan"], "warmup must be at least 0 and at most 1, got nan"),
        (["--batch-size", "999999999"], "batch_size=999999999: logits of 17.92 kB a row"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--learning-rate", "1e30", "--optimizer", "adamw", "--steps", "9"], "not finite"),
    ],
)
def test_errors_are_one_line(arguments, capsys, more, message):
    assert main([*arguments, "--quiet", *more]) == 1
    assert_one_line(capsys, message)


def test_a_directory_that_is_no_run_is_not_overwritten(arguments, tmp_path, capsys):
    diary = tmp_path / "runs" / "test" / "diary.txt"
    diary.parent.mkdir(parents=True)
    diary.write_text("my fellow citizens")
    assert main([*arguments, "--quiet", "--overwrite"]) == 1
    assert_one_line(capsys, "--overwrite deletes a run, and ")
    assert diary.read_text() == "my fellow citizens"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--optimiser", "adamw"], "--optimizer"),
        (["--optimizer", "adam"], "adamw"),
        (["--rank", "many"], "many"),
        (["--preset"], "Missing value for argument '--preset'"),
        (["--model.heads", "3"], "is not a multiple of heads=3"),
    ],
)
def test_wrong_arguments_are_explained(capsys, wrong, message):
    with pytest.raises(SystemExit) as error:
        main(wrong)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_option_points_to_the_whole_help(program, capsys):
    for wrong in ("--unknown=1", "--seed=many", "--preset=none"):
        with pytest.raises(SystemExit) as stop:
            program.main([wrong])
        errors = capsys.readouterr().err
        assert stop.value.code == 2 and "full helptext" not in errors
        assert re.fullmatch(r"all options: python -m \S+ --help-all", errors.splitlines()[-1])


@pytest.mark.parametrize("program", [*PROGRAMS, sample])
def test_the_whole_help_fits_the_terminal(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    option = "--help" if program is sample else "--help-all"
    assert max(map(len, help_of(program, option, capsys).splitlines())) <= 80


def test_a_preset_fills_what_is_not_given():
    assert parse([]) == run_preset("nano")
    config = parse(["--preset", "60m", "--rank", "32"])
    assert config.model == run_preset("60m").model
    assert config.optimizer.rank == 32
    assert config.steps == 10_000


def help_of(program, option, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main([option])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_a_screen_of_options_that_exist(program, capsys):
    brief, whole = (help_of(program, option, capsys) for option in ("--help", "--help-all"))
    lines = brief.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    options = {line.split()[0] for line in lines if line.startswith("  --")}
    assert len(options - {"--config", "--help-all"}) == 10
    for option in options - {"--help-all"}:
        assert option in whole


@pytest.mark.parametrize("program", PROGRAMS)
def test_lines_of_the_whole_help_are_full(program, capsys, monkeypatch):
    """Its text is wrapped for the terminal, not where the source is."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line[2:-2].rstrip() for line in help_of(program, "--help-all", capsys).splitlines()]
    width, pairs = 76, 0
    for line, following in itertools.pairwise(lines):
        if line.startswith("      ") and following.startswith("      "):
            pairs += 1
            assert len(line) + 1 + len(following.split()[0]) > width, line
    assert pairs > 10


def test_all_of_the_help_names_the_choices(capsys):
    text = " ".join(help_of(llama, "--help-all", capsys).split())
    for word in ("natural-galore", "adafactor", "--rank", "--interval", "--resume", "exit code"):
        assert word in text


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_flag_has_the_help_of_its_opposite(program, capsys):
    """A flag that is shown alone would be the one that changes the default."""
    shown = re.findall(r"(\S+, )?--(?:\S+\.)?no-\S+", help_of(program, "--help-all", capsys))
    assert shown and all(shown)


def test_paths_after_an_equals_sign_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "some.yaml").write_text("steps: 7\n")
    config = parse(["--config=~/some.yaml", "--root=~/runs", "--cache-dir=~/cache"])
    assert config.steps == 7
    assert (config.output.root, config.data.cache_dir) == (tmp_path / "runs", tmp_path / "cache")


def test_names_are_no_markup(capsys):
    cli.terminal().print("runs/a[/red]b [bold]c", highlight=False)
    assert capsys.readouterr().out == "runs/a[/red]b [bold]c\n"


def test_warnings_about_files_are_one_line():
    """Others say where in the code they come from."""
    program = (
        "import warnings; from examples.common.cli import exit_code as run\n"
        "def warn(*what): warnings.warn(*what); return 3\n"
        "run(lambda: warn('a.txt: bad')); raise SystemExit(run(lambda: warn('old', FutureWarning)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 3
    mine, other, *_ = found.stderr.splitlines()
    assert mine == "warning: a.txt: bad"
    assert other.endswith("FutureWarning: old") and ":2:" in other


def test_ctrl_c_during_the_imports_is_one_line(tmp_path):
    (tmp_path / "tyro.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n"
        "except BaseException as error:\n    raise ImportError from error\n"
    )
    for program in ("llama", "llama.plan", "llama.sample", "finetune.encoder"):
        found = subprocess.run(
            [sys.executable, "-m", f"examples.{program}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (found.returncode, found.stdout, found.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_of_a_caller_is_an_exception(capsys):
    """As in a notebook, which goes on."""
    assert cli.exit_code(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_terminal_without_the_characters_of_a_text():
    program = (
        "from examples.common import cli\n"
        "raise SystemExit(cli.exit_code(lambda: print('\u2502 caf\u00e9') or 3))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert (found.returncode, found.stdout) == (3, b"? caf\xe9\n")
