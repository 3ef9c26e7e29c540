"""Pre-training that goes on from published weights."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_weights as tiny
from flax import nnx
from tiny_run import after

from examples.common.errors import ConfigError
from examples.common.optimizers import OPTIMIZERS
from examples.llama.__main__ import main, parse
from examples.llama.data import load_splits
from examples.llama.evaluate import EvaluateConfig, evaluate
from examples.llama.loop import train
from examples.llama.model.adapters import AdapterConfig, make_linear
from examples.llama.run_config import run_preset
from examples.llama.training.optimization import make_optimization
from examples.llama.training.train_step import make_model
from examples.llama.weights.files import load_llama
from examples.llama.weights.initial import overlay, start_from

pytestmark = pytest.mark.usefixtures("fast_compile")

OPTIONS = [
    "--steps=2", "--batch-size=2", "--seq-len=16", "--model.stacked", "--optimizer=adamw",
    "--sample=w1", "--quiet",
]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Weights, and a text of their words."""
    rng = np.random.default_rng(0)
    for i in range(40):
        words = " ".join(f"w{n}" for n in rng.integers(1, 60, 40))
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(words)
    tiny.write_directory(tmp_path / "weights")
    return tmp_path


def options(files, *more):
    given = [f"--init-from={files / 'weights'}", f"--data={files / 'text'}", f"--root={files}"]
    return [*given, f"--cache-dir={files / 'cache'}", "--name=run", *OPTIONS, *more]


def run(config, **more):
    start = start_from(config)
    splits = load_splits(start.config.data, start.tokenizer)
    return train(start.config, splits=splits, initial=start.weights, **more)


def given_params(files, **how):
    return nnx.to_pure_dict(nnx.state(load_llama(str(files / "weights"), **how).model))


def test_model_weights_and_tokenizer_are_those_given(files):
    """After training at a learning rate of zero, interrupted and resumed without the files."""
    given = given_params(files, stacked=True)
    config = parse(options(files, "--learning-rate=0"))
    run(config, run_dir=config.run_dir, should_stop=after(1))
    shutil.rmtree(files / "weights")
    again = parse(options(files, "--learning-rate=0", "--resume"))
    result = run(again, run_dir=again.run_dir)
    assert result.finished
    jax.tree.map(np.testing.assert_array_equal, result.params, given)
    assert dataclasses.replace(result.config.model, stacked=False) == tiny.CASES["grouped_query"]
    assert result.splits.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert result.splits.vocab_size < result.config.model.vocab_size == 64


def test_other_weights_before_the_first_checkpoint(files):
    """Model and tokenizer of an earlier start that saved nothing are not those of the weights."""
    first = parse(options(files))
    run_dir = first.run_dir
    start = start_from(first)
    splits = load_splits(start.config.data, start.tokenizer)
    with pytest.raises(RuntimeError, match="killed"):
        train(start.config, splits=splits, initial=_killed, run_dir=run_dir)
    assert (run_dir / "tokenizer.json").exists()
    tiny.write_directory(files / "other")
    again = parse([*options(files, "--resume")[1:], f"--init-from={files / 'other'}"])
    assert start_from(again).note.startswith(f"weights from {files / 'other'}")


def _killed():
    raise RuntimeError("killed")


def test_adapters_beside_the_weights(files):
    given = given_params(files, stacked=True)
    config = dataclasses.replace(tiny.CASES["grouped_query"], stacked=True)
    linear = make_linear(AdapterConfig(kind="lora", rank=2))
    first = make_model(config, 0, linear)[1]
    up = overlay(first, given)["layers"]["mlp"]["up"]
    np.testing.assert_array_equal(up["base"]["kernel"], given["layers"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(
        up["lora"]["lora_a"], first["layers"]["mlp"]["up"]["lora"]["lora_a"]
    )
    factorised = {"layers": {"up": {"lora_a": np.ones(1), "lora_b": np.ones(1)}}}
    with pytest.raises(ConfigError, match=r"no place for layers\.up\.kernel"):
        overlay(factorised, {"layers": {"up": {"kernel": np.ones(1)}}})


def test_from_the_command_line(files, capsys):
    assert main(options(files)) == 0
    written = json.loads((files / "run" / "config.json").read_text())
    assert written["model"]["rope_theta"] == 100_000.0
    assert (files / "run" / "sample.txt").exists()
    (files / "weights" / "model.safetensors").unlink()
    assert main(options(files, "--overwrite")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {files / 'weights'}: no model.safetensors")
    assert error.count("\n") == 1


def test_learning_rate_is_one_for_trained_weights(files):
    """By default; the rate is seen in the schedule that the run follows."""
    unmeasured = OPTIMIZERS["racs"].learning_rate / 100
    for more, expected in (
        ((), 1e-4),
        (("--optimizer=racs",), unmeasured),
        (("--learning-rate=0.25",), 0.25),
    ):
        config = parse(options(files, "--warmup=0", *more))
        params = given_params(files, stacked=True)
        assert config.learning_rate == pytest.approx(expected)
        assert make_optimization(config, params).schedule(0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.hidden=64"], "model.hidden=64, and the weights have 32"),
        (["--model.rope-theta=500"], "model.rope_theta=500.0, and the weights have 100000.0"),
        (["--model.max-length=512"], "model.max_length=512, and the weights were trained up to 64"),
        (["--seq-len=100"], "seq_len=100 is longer than max_length=64"),
        (["--vocab-size=300"], "vocab_size is of a tokenizer to train"),
        (["--adapter.kind=lora", "--adapter.rank=17"], "smallest side of a layer's matrices, 16"),
    ],
)
def test_options_that_contradict_the_weights(files, more, message):
    with pytest.raises(ConfigError) as error:
        start_from(parse(options(files, *more)))
    assert message in str(error.value)


def test_the_rank_of_an_adapter_is_one_of_the_weights_not_of_the_preset(files):
    wide = {"hidden_size": 512, "intermediate_size": 512, "num_key_value_heads": 4}
    tiny.write_directory(files / "weights", **wide)
    config = parse(options(files, "--adapter.kind=lora", "--adapter.rank=160"))
    assert start_from(config).config.adapter.rank == 160 > run_preset("nano").model.smallest_side


def test_another_tokenizer_is_refused(files):
    other = json.loads((files / "weights" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    path = files / "other.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"2 tokens are not those of .*such as 'w1'"):
        start_from(parse(options(files, f"--tokenizer={path}")))
    (files / "weights" / "tokenizer.json").unlink()
    start = start_from(parse(options(files, f"--tokenizer={path}")))
    assert start.tokenizer.tokenizer.token_to_id("w1") == 2
    with pytest.raises(ConfigError, match="no tokenizer"):
        start_from(parse(options(files)))
    vocabulary["w99"] = 64
    path.write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="a tokenizer of 65 tokens, and weights for 64"):
        start_from(parse(options(files, f"--tokenizer={path}")))


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "gguf", "--tokenizer"])
def test_an_end_of_text_without_a_known_name_is_the_one_that_files_state(files, where):
    """In the text, in a run that is resumed from its own files, and in its evaluation."""
    directory, end, more = files / "weights", "<fin>", []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (directory / name).read_text().replace("</s>", end)
        (directory / name).write_text(text)
    if where == "tokenizer_config.json":
        config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": None}
        (directory / "config.json").write_text(json.dumps(config))
    else:
        (directory / "tokenizer_config.json").unlink()
    if where == "gguf":
        shutil.rmtree(directory)
        tiny.write_gguf(directory.with_suffix(".gguf"))
        more, end = [f"--init-from={directory}.gguf"], "<|end|>"
    if where == "--tokenizer":
        (directory / "tokenizer.json").rename(files / "own.json")
        more = [f"--tokenizer={files / 'own.json'}"]
    config = parse(options(files, *more))
    run(config, run_dir=config.run_dir, should_stop=after(1))
    result = run(parse(options(files, *more, "--resume")), run_dir=config.run_dir)
    splits = result.splits
    assert result.finished and splits.tokenizer.id_to_token(splits.end_of_text) == end
    assert np.count_nonzero(splits.train == splits.end_of_text) == splits.documents["train"]
    assert load_llama(str(config.run_dir)).end_ids == (splits.end_of_text,)
    evaluation = EvaluateConfig(str(config.run_dir), (str(files / "text"),), split="test")
    assert evaluate(evaluation)["documents"] == splits.documents["test"]


def test_unusable_weights(files):
    (files / "weights" / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="unknown architecture"):
        start_from(parse(options(files)))
