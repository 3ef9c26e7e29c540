"""Finished runs in the Hugging Face layout: one model in the run, the checkpoint and the export."""

import dataclasses
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run as tiny
import tiny_weights
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from examples.common.errors import CheckpointError, WeightsError
from examples.common.optimizers import OptimizerConfig
from examples.llama.__main__ import pretrained
from examples.llama.evaluate import main as evaluate
from examples.llama.export import export, main
from examples.llama.loop import train
from examples.llama.model.adapters import AdapterConfig
from examples.llama.weights import runs
from examples.llama.weights.files import load_llama, open_weights, replace_llama, save_llama
from examples.pretrained.hf_tokenizer import write_tokenizer

pytestmark = pytest.mark.usefixtures("fast_compile")

WORDS = ["<|endoftext|>", *(f"w{i}" for i in range(1, tiny.VOCAB))]
TIED = dataclasses.replace(tiny.MODEL, stacked=False, tied_embeddings=True, param_dtype="bfloat16")
CASES = {
    "stacked": {},
    "tied": {"model": TIED},
    "8 bits": {"weight_bits": 8, "per_layer": True},
    "lora": {"adapter": AdapterConfig(kind="lora", rank=2, alpha=3.0)},
    "factorised": {"adapter": AdapterConfig(kind="factorised", rank=4)},
}
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (3, 8), np.int32)

run = jax.jit(lambda model, ids: model(ids))


def splits():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return dataclasses.replace(tiny.splits(), tokenizer=words)


def trained(path, **changes):
    """A run of two steps, with both checkpoints, at a rate that moves everything."""
    adamw = OptimizerConfig(name="adamw", learning_rate=0.05)
    output = {"eval_every": 4, "save_every": 1}
    config = tiny.run_config(steps=2, output=output, optimizer=adamw, **changes)
    return train(config, splits=splits(), run_dir=path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, fast_compile):
    """The directory of a run, not to be changed, and its result."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    return directory, trained(directory, accumulate=2)


def params(model):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("case", CASES)
def test_the_export_is_the_model(tmp_path, case):
    result = trained(tmp_path / "run", **CASES[case])
    model = pretrained(result)
    replace_llama(model, tmp_path / "end")
    export(str(tmp_path / "run"), tmp_path / "later")
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("end", "later")]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert tensor.dtype == model.config.param_dtype
        np.testing.assert_array_equal(tensor, tensors[1][name])

    how = {"stacked": model.config.stacked, "param_dtype": model.config.param_dtype}
    logits = run(model.model, TOKENS)
    for name in ("end", "later", "run"):
        loaded = load_llama(str(tmp_path / name), **how)
        assert loaded.config == model.config
        assert loaded.end_ids == (0,)
        assert loaded.tokenizer.to_str() == model.tokenizer.to_str()
        assert np.asarray(run(loaded.model, TOKENS)).tobytes() == np.asarray(logits).tobytes()
    # To the run itself, whose adapters are products of their own.
    np.testing.assert_allclose(
        logits, result.apply(result.weights, TOKENS), rtol=0, atol=1e-5 * np.abs(logits).max()
    )
    assert np.std(logits) > 0.05


def test_files(tmp_path, finished):
    shutil.copytree(finished[0], tmp_path / "run")
    export(str(tmp_path / "run"), tmp_path / "run" / "export")
    directory = tmp_path / "run" / "export"
    assert sorted(p.name for p in directory.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 0
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == WORDS[0]
    # Without its checkpoints a run is its export.
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "moved")
    assert open_weights(str(tmp_path / "run")).path == directory


def test_an_export_of_what_is_no_run_needs_a_place(tmp_path, capsys):
    directory = tiny_weights.write_directory(tmp_path / "export")
    for name in (str(directory), str(tmp_path)):
        assert main([name]) == 1
        assert capsys.readouterr().err.endswith("in which the export would be: pass --to\n")
    assert not (directory / "export").exists()
    assert main([str(tmp_path), "--to", str(tmp_path / "copy")]) == 0
    assert load_llama(str(tmp_path / "copy")).end_ids == (0,)


def test_bfloat16_stays(tmp_path):
    directory = tiny_weights.write_directory(tmp_path / "model")
    path = directory / "model.safetensors"
    save_file({k: v.astype(jnp.bfloat16) for k, v in load_file(path).items()}, path)
    export(str(directory), tmp_path / "export")
    for name, tensor in load_file(tmp_path / "export" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, load_file(path)[name], strict=True)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"


def test_weights_of_a_method_are_those_of_its_best_epoch(tmp_path, monkeypatch, capsys):
    """In a comparison of fine-tuning methods, whose checkpoints are of another program."""
    method = tmp_path / "runs" / "galore"
    (method / "checkpoints" / "3").mkdir(parents=True)
    saved = {"model": "smollm2-135m-instruct", "data": None}
    monkeypatch.setattr(runs, "read_checkpoint", lambda *_: (saved, None))
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3")
    assert evaluate([str(method), "--data", str(text)]) == 1
    assert f"weights in {method / 'model'}, which is not there yet" in capsys.readouterr().err
    directory = tiny_weights.write_directory(method / "model")
    assert open_weights(str(method)).path == directory
    assert evaluate([str(method), "--data", str(text)]) == 0
    with pytest.raises(WeightsError, match=rf"a comparison of methods: name one of {method}$"):
        open_weights(str(method.parent))
    saved["model"] = {}  # Of a run that was exported into "model".
    assert runs.is_run(method)


def test_any_kept_step(tmp_path, finished):
    directory, result = finished
    last, before = (load_llama(str(directory), stacked=True, step=n).model for n in (2, 1))
    expected = params(pretrained(result).model)
    for a, b, c in zip(params(last), params(before), expected, strict=True):
        np.testing.assert_array_equal(a, c)
        assert np.any(np.asarray(a) != np.asarray(b))
    with pytest.raises(WeightsError, match=r"no checkpoint of step 3; there are those of 1, 2"):
        open_weights(str(directory), step=3)
    export(str(directory), tmp_path / "hf", step=1)
    again = load_llama(str(tmp_path / "hf"), stacked=True).model
    for a, b in zip(params(again), params(before), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(WeightsError, match="no step 1"):
        open_weights(str(tmp_path / "hf"), step=1)


def test_damage_and_other_files(tmp_path, finished):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for directory in ("other", "run"):
        with pytest.raises(WeightsError, match="not empty"):
            export(str(tmp_path / "run"), tmp_path / directory)
    newest = tmp_path / "run" / "checkpoints" / "4"
    # All of them: which of the files has the weights, TensorStore decides by time.
    files = [p for p in (newest / "state").rglob("*") if p.parent.name == "d"]
    files[0].write_bytes(bytes([files[0].read_bytes()[0] ^ 1]) + files[0].read_bytes()[1:])
    with pytest.raises(CheckpointError, match="not what was written"):
        export(str(tmp_path / "run"), tmp_path / "hf")
    # As a copy of a run that was cut off: without digests, which are compared first.
    (newest / "digests.json").unlink()
    for broken in (files, [newest / "config" / "metadata"]):
        for file in broken:
            file.write_text("{")
        with pytest.raises(CheckpointError, match="4: cannot be read") as error:
            export(str(tmp_path / "run"), tmp_path / "hf")
        assert "\n" not in str(error.value)


def test_a_full_disk_is_named(tmp_path, finished):
    model = pretrained(finished[1])
    with tiny.full_disk(100):
        with pytest.raises(WeightsError, match=r"model\.safetensors: cannot be written \(.*large"):
            replace_llama(model, tmp_path / "hf")
        with pytest.raises(OSError, match="File too large"):
            write_tokenizer(model.tokenizer, None, {}, tmp_path)
    replace_llama(model, tmp_path / "hf")


def test_files_that_are_no_part_of_a_model_stay(tmp_path, finished):
    model = pretrained(finished[1])
    replace_llama(model, tmp_path / "hf")
    mine, stale = (
        tmp_path / "hf" / "README.md",
        tmp_path / "hf" / "model-00001-of-00002.safetensors",
    )
    for file in (mine, stale):
        file.write_text("mine")
    replace_llama(model, tmp_path / "hf")
    assert mine.read_text() == "mine" and not stale.exists()


def test_killed_when_the_older_export_is_deleted(tmp_path, finished, monkeypatch):
    model = pretrained(finished[1])
    replace_llama(model, tmp_path / "hf")

    def killed(path, **_):
        for file in Path(path).rglob("config.json"):
            file.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        replace_llama(model, tmp_path / "hf")
    assert load_llama(str(tmp_path / "hf"), stacked=True).config == model.config
    replace_llama(model, tmp_path / "hf")


@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
@pytest.mark.parametrize("case", ["stacked", "tied", "lora"])
def test_transformers_computes_the_same(tmp_path, case):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = pretrained(trained(tmp_path / "run", **CASES[case]))
    save_llama(model, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    ours = np.asarray(run(model.model, TOKENS))
    np.testing.assert_allclose(logits, ours, rtol=0, atol=1e-5 * np.abs(ours).max())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("w3 w7")["input_ids"] == [3, 7]
    assert tokenizer.eos_token == WORDS[0]
