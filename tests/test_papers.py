"""The papers' experiments: every configuration, the table of the page, and one run of each kind."""

import gzip
import importlib
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from examples.common.cli import command
from examples.common.optimizers import make_optimizer
from examples.llama.__main__ import parse
from examples.llama.data.tokenizer import train_tokenizer
from examples.papers import __main__ as papers
from examples.papers.cost import configurations, table
from examples.papers.experiments import EXPERIMENTS, GLUE, LLAMA
from examples.papers.results import glue_table

os.environ["HF_HUB_OFFLINE"] = "1"  # Read when `datasets` is imported.
pytestmark = pytest.mark.usefixtures("fast_compile")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_is_one_of_its_program(name):
    experiment = EXPERIMENTS[name]
    configs = configurations(name, experiment)
    assert len({config.run_dir for config in configs.values()}) == len(experiment.variants)
    if experiment.program != LLAMA:
        return
    for config in configs.values():
        make_optimizer(config.optimizer, config.schedule, steps=9, accumulate=1, seed=0)
        assert config.model.param_dtype == config.model.dtype == "bfloat16"
        assert config.data.rows == "documents" and config.data.tokenizer == "t5-base"
        throughput = name.startswith("throughput")
        assert config.tokens_per_step == (256 if throughput else 512 * 256)


def test_protocol_of_galore():
    (config,) = configurations("c4-60m/galore", EXPERIMENTS["c4-60m/galore"]).values()
    optimizer = config.optimizer
    assert (optimizer.rank, optimizer.update_interval, optimizer.scale) == (128, 200, 0.25)
    assert (config.learning_rate, config.unprojected_ratio) == (0.01, None)
    assert (config.steps, config.schedule.warmup, config.schedule.floor) == (10_000, 0.1, 0.1)
    assert config.seed == 42 and config.data.shuffle == 1000
    rates = configurations("c4-1b/lora", EXPERIMENTS["c4-1b/lora"]).values()
    assert [c.learning_rate for c in rates] == [0.01, 0.005, 0.001, 0.0005, 0.0001]
    (single,) = configurations("c4-7b/galore-8bit", EXPERIMENTS["c4-7b/galore-8bit"]).values()
    assert single.optimizer.moment_bits == 8 and single.optimizer.clip_norm == 1.0
    assert (single.optimizer.update_interval, single.learning_rate) == (500, 0.005)


def test_table_of_the_page():
    page = (ROOT / "docs" / "papers.md").read_text()
    found = page.split("<!-- papers:begin -->")[1].split("<!-- papers:end -->")[0].strip()
    assert found == table(EXPERIMENTS)


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs without a process for each."""
    commands = []

    def call(command):
        commands.append(command)
        return importlib.import_module(f"{command[2]}.__main__").main(command[3:])

    monkeypatch.setattr(papers, "run_program", call)
    return commands


@pytest.fixture
def c4(tmp_path):
    """Files as on the hub, and a tokenizer."""
    texts = [f"number {i} is {' '.join(str(i * k % 97) for k in range(9))}" for i in range(200)]
    (tmp_path / "c4").mkdir()
    for split, part in {"train": texts[20:], "validation": texts[:20]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / "c4" / f"{split}.json.gz").write_bytes(gzip.compress(lines.encode()))
    train_tokenizer(texts, 300).save(str(tmp_path / "tokenizer.json"))
    return ["--data", f"hf:{tmp_path / 'c4'}", "--tokenizer", str(tmp_path / "tokenizer.json")]


TINY = shlex.split(
    "--steps 2 --batch-size 2 --accumulate 2 --seq-len 16 --held-out 4 --shuffle 10 --rank 4 "
    "--model.hidden 16 --model.intermediate 24 --model.layers 2 --model.heads 2 "
    "--model.kv-heads 1 --max-documents 50 --quiet"
)


def test_pretraining_on_files_of_the_hub(c4, tmp_path, in_this_process, capsys):
    pytest.importorskip("datasets", reason="the hub extra is not installed")
    options = [*c4, *TINY, "--root", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    assert papers.main(["c4-60m/galore", *options]) == 0
    run = tmp_path / "runs" / "c4-60m-galore"
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["rows"] == "documents" and config["model"]["dtype"] == "bfloat16"
    assert "c4-60m-galore" in capsys.readouterr().out
    assert papers.main(["c4-60m/galore", *options]) == 0  # Not once more.
    assert len(in_this_process) == 1 and "done before" in capsys.readouterr().out
    assert papers.main(["c4-60m/galore", *options, "--steps", "1"]) == 1
    assert "done before with other options (steps: 2 -> 1): pass --ov" in capsys.readouterr().err
    made = (run / "summary.json").stat().st_mtime_ns
    assert papers.main(["c4-60m/galore", *options, "--overwrite"]) == 0
    assert (run / "summary.json").stat().st_mtime_ns > made


def test_finetuning_on_files(tmp_path, in_this_process, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "function_calling"))
    import tiny_planner

    options = tiny_planner.command_line(tmp_path)
    at = options.index("--dataset")  # The experiment's own.
    options = options[:at] + options[at + 2 :]
    options += ["--root", str(tmp_path / "runs"), "--limit", "4", "--eval-limit", "1", "--quiet"]
    options += ["--held-out", "0.1", "--epochs", "1", "--examples", "0"]
    assert papers.main(["tinyagent/lora", *options]) == 0
    assert "tinyagent-lora" in capsys.readouterr().out


def test_glue_on_files(tmp_path, in_this_process, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "glue"))
    import tiny_encoder

    tensors = {k: v for k, v in tiny_encoder.weights("bert").items() if "classifier" not in k}
    model = tiny_encoder.write_model(tmp_path / "model", tensors=tensors)
    rows = [{"sentence": text, "label": y} for text, y in tiny_encoder.sentences(16)]
    (tmp_path / "rows" / "sst2").mkdir(parents=True)
    for name in ("train", "dev"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows" / "sst2" / f"{name}.jsonl").write_text(text)
    experiment = EXPERIMENTS["glue/natural-galore-rank-4"]
    of_one_task = {k: v for k, v in experiment.variants.items() if k.startswith("sst2")}
    monkeypatch.setitem(papers.EXPERIMENTS, "glue/some", experiment._replace(variants=of_one_task))
    options = ["--model", str(model), "--data", str(tmp_path / "rows"), "--rank", "2", "--quiet"]
    options += ["--max-length", "8", "--epochs", "1", "--batch-size", "8"]
    # No task is trained on the rows of another.
    assert papers.main(["glue/natural-galore-rank-4", *options]) == 1
    assert f"there is no {tmp_path / 'rows' / 'cola'}" in capsys.readouterr().err
    assert papers.main(["glue/some", *options, "--root", str(tmp_path / "runs")]) == 0
    assert len(in_this_process) == 3
    printed = capsys.readouterr().out
    assert "average" in printed and "missing: cola" in printed


def test_averages_take_the_best_rate_of_each_task(tmp_path):
    runs = []
    for task in GLUE:
        for rate, score in ((1e-5, 0.5), (2e-5, 0.9 if task == "cola" else 0.7), (3e-5, 0.6)):
            run = tmp_path / f"{task}-{rate}"
            run.mkdir()
            names = ("matthews", "pearson", "f1", "accuracy")
            splits = ("validation", "validation_matched", "validation_mismatched")
            metrics = {split: dict.fromkeys(names, score) for split in splits}
            method = {"method": "adamw", "metrics": metrics, "learning_rate": rate}
            # As with --methods adamw lora.
            methods = [method, {**method, "method": "lora"}] if task == "cola" else [method]
            (run / "summary.json").write_text(json.dumps({"task": task, "methods": methods}))
            runs.append(run)
    names, tasks, notes, rates, values = (list(c.cells) for c in glue_table(runs).columns)
    assert names == ["adamw"] * 9 + ["lora"] * 2
    assert values[0] == "90.00" and set(values[1:8]) == {"70.00"}
    assert (tasks[8], values[8]) == ("average", f"{(90 + 7 * 70) / 8:.2f}")
    assert set(rates[:8]) == {"2e-05"}
    assert notes[-1].startswith("of 1; missing: stsb") and values[-1] == values[-2] == "90.00"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_saves_before_it_stops(number, tmp_path):
    code = f"""
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: exit(143))
signal.signal(signal.SIGINT, lambda *_: exit(130))
os.kill(os.getppid(), {int(number)})
if {int(number)} == signal.SIGINT: os.kill(os.getpid(), {int(number)})  # As a terminal does.
time.sleep(60)
"""
    handler = signal.getsignal(number)
    assert papers.run_program([sys.executable, "-c", code]) == 128 + number
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("arguments", [["c4-60m/none"], ["none", "--print"]])
def test_an_unknown_name(arguments, capsys):
    assert papers.main(arguments) == 1
    assert "no experiment is called" in capsys.readouterr().err


def test_the_help_of_the_program_is_printed_once(monkeypatch):
    commands = []
    monkeypatch.setattr(papers, "run_program", lambda command: commands.append(command) or 0)
    assert papers.main(["glue/galore-rank-4", "--help"]) == 0
    ((*_, last),) = commands
    assert last == "--help"


def test_the_command_line_is_printed(capsys):
    assert papers.main(["c4-60m/galore", "--print", "--steps", "5"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{command('examples.llama')} --preset 60m")
    assert line.endswith("--steps 5")


_REFUSED = {
    "glue/full --task sst2": "--task cannot be given: each run of glue/full sets it",
    "glue/full --learning-rate 1e-5": "--learning-rate cannot be given: each run of glue/full",
    "c4-60m/lora --learning_rate=1": "--learning-rate cannot be given: each run of c4-60m/lora",
    "throughput-1b --no-per-layer": "--per-layer cannot be given: each run of throughput-1b",
    "ablation-130m/rank --steps 5": "--steps cannot be given: each run of ablation-130m/rank",
    "c4-60m/galore --optimizer adamw": "--optimizer cannot be given: c4-60m/galore sets it",
    "c4-60m/lora --adapter.kind relora": "--adapter.kind cannot be given: c4-60m/lora sets it",
    "c4-60m/galore --preset 130m": "--preset cannot be given: c4-60m/galore sets it",
    "c4-1b/galore-rank-1024 --rank 8": "--rank cannot be given: c4-1b/galore-rank-1024 sets it",
    "tinyagent/lora --methods adamw": "--methods cannot be given: tinyagent/lora sets it",
    "c4-60m/galore --name mine": "--name cannot be given: the runs of c4-60m/galore have their own",
}


@pytest.mark.parametrize("printed", [[], ["--print"]])
@pytest.mark.parametrize("line", _REFUSED)
def test_an_option_that_a_run_is_named_after(line, printed, capsys, monkeypatch):
    monkeypatch.setattr(papers, "run_program", lambda _: pytest.fail("a run was started"))
    assert papers.main([*line.split(), *printed]) == 1
    assert _REFUSED[line] in capsys.readouterr().err


def test_a_file_of_options_is_read_too(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("learning-rate: 0.1\n")
    assert papers.main(["c4-60m/lora", "--config", str(tmp_path / "options.yaml"), "--print"]) == 1
    assert "--learning-rate cannot be given" in capsys.readouterr().err


def test_a_file_of_options_wins_like_the_command_line(tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text("batch-size: 64\naccumulate: 8\ndata: [my.txt]\n")
    assert papers.main(["c4-60m/galore", "--config", str(file), "--print"]) == 0
    words = shlex.split(capsys.readouterr().out)
    config = parse(words[words.index("examples.llama") + 1 :])
    assert (config.batch_size, config.accumulate, config.data.data) == (64, 8, ("my.txt",))


def test_runs_below_the_home_directory_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(papers, "run_program", lambda _: pytest.fail("a run was started"))
    monkeypatch.setattr("examples.papers.results.results", lambda *_: "")
    run = tmp_path / "x" / "c4-60m-galore"
    run.mkdir(parents=True)
    (line,) = EXPERIMENTS["c4-60m/galore"].runs("c4-60m/galore").values()
    (run / "papers.json").write_text(json.dumps({"options": [*line, "--root=~/x"]}))
    assert papers.main(["c4-60m/galore", "--root=~/x"]) == 0
    assert f"{run}: done before" in capsys.readouterr().out.replace("\n", "")


def test_other_options_are_for_all_runs(capsys):
    assert papers.main(["glue/full", "--print", "--rank", "2", "--root", "x", "--epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 24 and all(line.endswith("--rank 2 --root x --epochs 1") for line in lines)
