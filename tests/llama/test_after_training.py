"""Commands on a finished run: the lines that the program ends with, and runs that start from it."""

import contextlib
import dataclasses
import importlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_weights
from cluster_run import write_text
from flax import nnx
from tokenizers import Tokenizer, processors

from examples.common import reporter
from examples.common.errors import DataError
from examples.common.metrics import of_kind, read_metrics
from examples.common.text import printable
from examples.llama.__main__ import main
from examples.llama.data import eval_batches
from examples.llama.evaluate import EvaluateConfig, evaluate
from examples.llama.sample import main as sample
from examples.llama.weights.files import load_llama

pytestmark = pytest.mark.usefixtures("fast_compile")

ROOT = Path(__file__).parents[2]
SIZES = [
    "--model.hidden=16", "--model.intermediate=24", "--model.layers=2", "--model.heads=2",
    "--model.kv-heads=1", "--vocab-size=280",
]  # fmt: skip
HOW = ["--seq-len=16", "--batch-size=2", "--optimizer=adamw", "--steps=2"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Options for a small text and for directories of the tests, which have a space in the name."""
    directory = tmp_path_factory.mktemp("own runs")
    text = directory / "text.jsonl"
    write_text(text)
    return [f"--data={text}", f"--root={directory}", f"--cache-dir={directory / 'cache'}"]


@pytest.fixture(scope="module")
def finished(places, fast_compile):
    """The directory of a run, and what the program printed, with a line for every wait."""
    printed = io.StringIO()

    def speaking(console, quiet, describe):
        return reporter.Lines(console, describe, silence=0.01)

    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr("examples.llama.__main__.make_reporter", speaking)
        assert main([*places, *SIZES, *HOW, "--name=one", "--sample=-we the"]) == 0
    return Path(places[1].removeprefix("--root=")) / "one", printed.getvalue()


def command(finished, name):
    """Arguments of one of the commands that the program ends with, and its module."""
    lines = [shlex.split(line) for line in finished[1].splitlines()[-3:]]
    words = next(line for line in lines if line[2] == f"examples.llama.{name}")
    assert words[3] == str(finished[0])
    return importlib.import_module(words[2]).main, words[3:]


def test_the_sample_command(finished, capsys):
    main, words = command(finished, "sample")
    more = ["--samples", "2", "--tokens", "4", "--temperature", "0"]
    assert main([*words, *more]) == 0
    first, second = capsys.readouterr().out.split("--- 2 of 2\n")
    assert first.startswith("--- 1 of 2\n-we the")
    assert second.startswith("-we the") and len(second) > len("-we the\n")
    assert first.split("\n")[1] == second.split("\n")[0]  # At a temperature of 0.


@pytest.mark.parametrize("where", ["run", "run/export"])
def test_a_prompt_is_continued_though_the_tokenizer_ends_texts(
    finished, places, tmp_path, monkeypatch, where
):
    """The template of t5-base, `$A </s>`, whose token would begin another document."""
    words = Tokenizer.from_file(str(finished[0] / "tokenizer.json"))
    end = words.token_to_id("<|endoftext|>")
    words.post_processor = processors.TemplateProcessing(
        "$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    (tmp_path / "t5.json").write_text(words.to_str())
    given = [places[0], *SIZES[:-1], *HOW, f"--root={tmp_path}", f"--cache-dir={tmp_path}/cache"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*given, "--tokenizer=~/t5.json", "--name=run", "--quiet", "--steps=1"]) == 0
    prompts = []

    def stream(model, ids, *_, **__):
        prompts.append(ids)
        return iter([5])

    monkeypatch.setattr("examples.llama.sample.stream", stream)
    assert sample([str(tmp_path / where), "--prompt=we the"]) == 0
    assert sample([str(tmp_path / where)]) == 0
    assert prompts == [words.encode("we the", add_special_tokens=False).ids, [end]]


def test_only_an_empty_prompt_needs_an_end_of_text_token(tmp_path, monkeypatch, capsys):
    """Of a directory without `eos_token_id`, whose tokenizer has no name that is known."""
    directory = tiny_weights.write_directory(tmp_path / "model", eos_token_id=None)
    words = (directory / "tokenizer.json").read_text().replace("</s>", "<fin>")
    (directory / "tokenizer.json").write_text(words)
    prompts = []

    def stream(model, ids, *_, **__):
        prompts.append(ids)
        return iter([5])

    monkeypatch.setattr("examples.llama.sample.stream", stream)
    assert sample([str(directory), "--prompt=w3 w7"]) == 0
    assert prompts == [[3, 7]]
    capsys.readouterr()
    assert sample([str(directory)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: an empty --prompt: no end-of-text token (one of <|endoftext|>")


def test_the_token_that_begins_a_document_is_not_shown(tmp_path, monkeypatch, capsys):
    """Of a tokenizer in which it is a word as others."""
    directory = tiny_weights.write_directory(tmp_path / "model")
    monkeypatch.setattr("examples.llama.sample.stream", lambda *_, **__: iter([27, 5, 8]))
    assert sample([str(directory)]) == 0
    assert capsys.readouterr().out.strip() == "w27 w5 w8"


def test_samples_keep_all_but_control_characters():
    kept = "\ttab\nno\u00a0break\u3000wide \u200c\U0001f469\u200d\U0001f52c"
    assert printable(kept) == kept
    assert printable("\x1b[2J\r\x00\x9b") == "\ufffd[2J\ufffd\ufffd\ufffd"


def test_waiting_for_the_results_has_lines(finished):
    assert "writing summary, sample and export: " in finished[1]


def test_waiting_has_lines_on_stderr(finished, monkeypatch, capsys):
    monkeypatch.setattr(reporter, "SILENCE", 0.01)
    for name, doing in (
        ("sample", "compiling the model: "),
        ("evaluate", "evaluating: "),
    ):
        main, words = command(finished, name)
        assert main(words) == 0
        printed = capsys.readouterr()
        assert doing in printed.err and "so far" not in printed.out
        assert "step" not in printed.err  # That is for training.


def test_the_evaluate_command_gives_the_loss_of_the_run(finished, tmp_path, capsys):
    main, words = command(finished, "evaluate")
    assert main([*words, "--json", str(tmp_path / "loss.json")]) == 0
    expected = of_kind(read_metrics(finished[0] / "metrics.jsonl"), "test")[-1]
    found = json.loads((tmp_path / "loss.json").read_text())
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert f"loss {expected['loss']:.4f}" in capsys.readouterr().out
    # The export is the same model; the whole text is more than its test split.
    whole = evaluate(EvaluateConfig(str(finished[0] / "export"), (words[2],), seq_len=16))
    assert whole["tokens"] > 10 * found["tokens"]
    size = sum(len(json.loads(line)["text"]) for line in Path(words[2]).read_text().splitlines())
    nats = whole["bits_per_byte"] * size * np.log(2)
    assert nats == pytest.approx(whole["loss"] * whole["tokens"])


def test_an_evaluation_has_no_rows_that_only_fill_a_batch(finished, tmp_path, monkeypatch):
    given = []

    def batches(tokens, size, *more, **options):
        given.append(size)
        return eval_batches(tokens, size, *more, **options)

    monkeypatch.setattr("examples.llama.evaluate.eval_batches", batches)
    text = tmp_path / "text.txt"
    text.write_text("we the people")
    for rows in ("packed", "documents"):
        config = EvaluateConfig(
            str(finished[0]), (str(text),), batch_size=10**9, seq_len=99, rows=rows
        )
        assert evaluate(config)["documents"] == 1
    assert given == [1, 1]


def test_a_run_on_documents_is_evaluated_on_documents(places, tmp_path):
    """Rows, their length and the split are those of the run unless the command line has others."""
    text = tmp_path / "notes.jsonl"
    lines = Path(places[0].removeprefix("--data=")).read_text().replace('"text"', '"note"')
    text.write_text(lines)
    run = tmp_path / "documents"
    settings = ["--rows=documents", "--split-seed=3", "--text-column=note", "--seq-len=9"]
    where = [f"--data={text}", f"--root={tmp_path}", *places[2:], "--quiet", f"--name={run.name}"]
    assert main([*where, *SIZES, *HOW, *settings]) == 0
    expected = of_kind(read_metrics(run / "metrics.jsonl"), "test")[-1]["loss"]
    found = evaluate(EvaluateConfig(str(run), (str(text),), "test"))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["tokens"] <= 8 * found["documents"]
    assert found["bits_per_byte"] is None  # Not all bytes of a document are evaluated.
    packed = evaluate(EvaluateConfig(str(run), (str(text),), "test", rows="packed"))
    assert packed["tokens"] > found["tokens"]
    # An export has no settings of a run, but the command line has.
    export = EvaluateConfig(str(run / "export"), (str(text),), "test")
    with pytest.raises(DataError, match='"text", got the fields note; --text-column names it'):
        evaluate(export)
    text.write_text(lines + '{"note": "\\u0000"}\n')
    named = dataclasses.replace(
        export, text_column="note", rows="documents", split_seed=3, seq_len=9
    )
    with pytest.raises(DataError, match=r"1 NUL character.*: --skip-bad-lines leaves out"):
        evaluate(named)
    with pytest.warns(UserWarning, match="1 bad line"):
        found = evaluate(dataclasses.replace(named, skip_bad_lines=True))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_what_is_written_last_may_be_damaged(finished, places, capsys):
    """The results of a finished run are written again."""
    run_dir, _ = finished
    again = [*places, *SIZES, *HOW, "--name=one", "--resume", "--quiet"]
    for text in ("", "{}"):
        (run_dir / "summary.json").write_text(text)
        assert main([*again, "--sample=-we the"]) == 0
        assert "parameters" in json.loads((run_dir / "summary.json").read_text())


def test_a_step_is_found_beside_a_damaged_checkpoint(finished, places, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    newest = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.copytree(newest, newest.with_name("9"))
    (newest.with_name("9") / "config" / "metadata").write_text("")
    for module in ("export", "sample", "evaluate"):
        more = {"export": [f"--to={tmp_path / 'out'}"], "sample": ["--prompt=we", "--tokens=2"]}
        more = more.get(module, places[:1])
        program = importlib.import_module(f"examples.llama.{module}")
        assert program.main([str(run_dir), "--step=2", *more]) == 0


def test_a_sample_that_cannot_be_made_is_no_error(finished, places, monkeypatch, capsys):
    def none(*_):
        raise DataError("the tokenizer cannot encode the text")

    monkeypatch.setattr("examples.llama.__main__.continued", none)
    assert main([*places, *SIZES, *HOW, "--name=one", "--resume", "--quiet", "--sample=-we"]) == 0
    text = (finished[0] / "sample.txt").read_text()
    assert text == "no sample: the tokenizer cannot encode the text\n"


def test_the_export_command(finished, capsys):
    main, words = command(finished, "export")
    assert main(words) == 0
    directory = Path(capsys.readouterr().out.strip())
    assert directory == finished[0].with_name("one-step2")
    files = [(d / "model.safetensors").read_bytes() for d in (directory, finished[0] / "export")]
    assert files[0] == files[1]


def test_an_export_of_a_run_at_home_is_there(finished, monkeypatch, capsys):
    """A quoted ~, which no shell has expanded."""
    monkeypatch.setenv("HOME", str(finished[0].parent))
    monkeypatch.chdir(finished[0])
    assert importlib.import_module("examples.llama.export").main(["~/one"]) == 0
    assert capsys.readouterr().out.strip() == str(finished[0] / "export")


def test_as_programs(finished):
    """The line as it is printed, in a shell."""
    line = finished[1].splitlines()[-3] + " --tokens=2"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("-we the")
    # A reader that has enough is no error.
    head = subprocess.run(
        f"{line} --samples=99 | head -c 3", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert head.stdout == "---" and "rror" not in head.stderr
    devices, *waiting = done.stderr.splitlines()
    assert devices.startswith("devices: ")
    assert all(line.endswith(" s so far") for line in waiting)
    interpreter = ROOT / shlex.split(line)[0] if "/" in shlex.split(line)[0] else sys.executable
    assert Path(interpreter).absolute() == Path(sys.executable).absolute()


@pytest.mark.parametrize("where", ["", "export"])
def test_a_run_starts_from_a_run(finished, places, where):
    source = finished[0] / where
    options = [*places, *HOW, "--steps=1", "--learning-rate=0", "--overwrite", "--quiet"]
    assert main([*options, f"--name=two{where}", f"--init-from={source}"]) == 0
    run = finished[0].with_name(f"two{where}")
    for a, b in zip(*(leaves(path) for path in (run, source)), strict=True):
        np.testing.assert_array_equal(a, b)
    tokenizers = [(path / "tokenizer.json").read_text() for path in (run, source)]
    assert tokenizers[0] == tokenizers[1]
    # Its file of options repeats it.
    assert main(["--config", str(run / "config.yaml"), "--resume"]) == 0


def leaves(path):
    state = nnx.state(load_llama(str(path)).model, nnx.Param)
    return [np.asarray(value) for _, value in sorted(nnx.to_flat_state(state))]


def test_errors_are_one_line(finished, places, capsys):
    run = str(finished[0])
    again = [*places, *HOW, "--name=one", "--overwrite", f"--init-from={finished[0] / 'export'}"]
    for program, words, message in (
        (main, again, "--overwrite would delete --init-from"),
        (sample, [run, "--top-p=2"], "top_p must be above 0"),
        (sample, [run, "--temperature=inf"], "temperature must be 0 or from 1e-6 to 1e6, got inf"),
        (sample, [f"{run}/config.json"], "config.json: expected a directory or a file *.gguf"),
        (sample, [f"{run}/checkpoints"], "checkpoints: neither a run, which has checkpoints or"),
        (sample, [run, "--step=7"], "no checkpoint of step 7; there are those of 2"),
        (sample, [run, "--samples=0"], "samples must be at least 1 and less than inf, got 0"),
        (sample, [run, f"--seed={2**64}"], "seed must be at least 0 and less than 2147483648, got"),
        (command(finished, "evaluate")[0], [run, "--data=no.txt"], "no.txt: no such file"),
        (command(finished, "evaluate")[0], ["--data", run], "name the model before --data"),
        (command(finished, "evaluate")[0], [run, places[0], "--seq-len=999"], "max_length=128"),
        (command(finished, "export")[0], [str(ROOT), "--to=nowhere"], "neither a run"),
    ):
        capsys.readouterr()
        assert program(words) == 1
        *before, error = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and message in error
        assert all(line.startswith("devices: ") for line in before)
    assert (finished[0] / "export").is_dir()


def test_the_extra_examples_is_enough():
    """Packages that only published weights need are not imported."""
    program = (
        "import sys; sys.modules.update(gguf=None, jinja2=None, transformers=None)\n"
        "import examples.llama.__main__, examples.llama.sample, examples.llama.evaluate\n"
        "import examples.llama.export\n"
        "from examples.llama.weights.files import open_weights\n"
        "open_weights('model.gguf')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("WeightsError: model.gguf: no such file")
