"""Published weights: logits are those of transformers, and nothing that does not fit is loaded."""

import json
import shutil
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_weights as tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from examples.common.errors import WeightsError
from examples.llama.model.llama import unstack_layers
from examples.llama.weights.files import load_llama, open_weights, save_llama

pytestmark = pytest.mark.usefixtures("fast_compile")

run = jax.jit(lambda model, ids: model(ids))


def written(kind, path, case="grouped_query", **changes):
    if kind == "gguf":
        return tiny.write_gguf(path / "model.gguf", case, **changes)
    return tiny.write_directory(path / "model", case, **changes)


@pytest.mark.parametrize("case", tiny.CASES)
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_logits_equal_transformers(tmp_path, kind, case):
    expected = tiny.arrays(case)
    path = str(written(kind, tmp_path, case))
    loaded = load_llama(path)
    assert loaded.config == tiny.CASES[case]
    logits = run(loaded.model, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    stacked = nnx.to_pure_dict(nnx.state(load_llama(path, stacked=True).model))
    jax.tree.map(
        np.testing.assert_array_equal,
        unstack_layers(stacked),
        nnx.to_pure_dict(nnx.state(loaded.model)),
    )


@pytest.mark.parametrize("case", tiny.CASES)
def test_what_is_saved_is_what_was_loaded(tmp_path, case):
    directory = tiny.write_directory(tmp_path / "model", case)
    loaded = load_llama(str(directory), stacked=case == "tied")
    save_llama(loaded, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    original = tiny.weights(case)
    assert tensors.keys() == original.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, original[name])
        assert tensor.dtype == original[name].dtype
    raw, given = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "saved", directory)
    )
    given.pop("rope_scaling")
    assert {key: raw[key] for key in given} == given
    again = open_weights(str(tmp_path / "saved"))
    assert again.config == open_weights(str(directory)).config
    assert again.end_ids == loaded.end_ids == (0,)
    assert again.tokenizer.to_str() == loaded.tokenizer.to_str()
    assert again.chat_template == loaded.chat_template
    # safetensors makes files that others may not read.
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1


@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
@pytest.mark.parametrize("case", tiny.CASES)
def test_transformers_reads_what_is_saved(tmp_path, case):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_llama(load_llama(str(tiny.write_directory(tmp_path / "model", case))), tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = tiny.arrays(case)
    with torch.no_grad():
        logits = model(torch.tensor(expected["tokens"].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("w3 w7")["input_ids"] == [3, 7]
    assert tokenizer.eos_token == "</s>"


def test_parts_in_bfloat16(tmp_path):
    directory = tiny.write_directory(tmp_path / "model")
    half = {
        k: np.asarray(jnp.asarray(v, jnp.bfloat16))
        for k, v in tiny.weights("grouped_query").items()
    }
    names = sorted(half)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: half[name] for name in some}, directory / file)
    where = {name: file for file, some in parts.items() for name in some}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "model.safetensors").unlink()
    model = load_llama(str(directory)).model
    kernel = model.layers[1].mlp.up.kernel[...]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, np.float32(half["model.layers.1.mlp.up_proj.weight"]).T)
    kept = load_llama(str(directory), param_dtype="bfloat16", dtype="bfloat16").model
    assert {x.dtype for x in jax.tree.leaves(nnx.state(kept))} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "changes",
    [
        {"partial_rotary_factor": 1.0, "attention_dropout": 0.0, "pretraining_tp": 1},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
        {"rope_scaling": {"type": "default"}, "rope_interleaved": False, "logits_scaling": 1.0},
    ],
)
def test_what_has_no_effect_is_accepted(tmp_path, changes):
    plain = open_weights(str(tiny.write_directory(tmp_path / "plain")))
    other = open_weights(str(tiny.write_directory(tmp_path / "model", **changes)))
    assert other.config == plain.config


@pytest.mark.parametrize(
    ("in_config", "in_generation", "ends"),
    [
        (3, None, (3,)),
        (3, 5, (5,)),
        (3, [5, 7], (5, 7)),
        ([3, 4], None, (3, 4)),
        (None, None, (0,)),  # The tokenizer's settings have one.
    ],
)
def test_null_is_no_end_of_answers(tmp_path, in_config, in_generation, ends):
    directory = tiny.write_directory(tmp_path / "model", eos_token_id=in_config)
    settings = {"eos_token_id": in_generation}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    assert open_weights(str(directory)).end_ids == ends


@pytest.mark.parametrize("file", ["model-1.safetensors", "model-2.safetensors"])
def test_a_tied_head_in_the_index_alone(tmp_path, file):
    directory = tiny.write_directory(tmp_path / "model", "tied")
    before = load_llama(str(directory))
    names = load_file(directory / "model.safetensors").keys()
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    where = dict.fromkeys(names, "model-1.safetensors") | {"lm_head.weight": file}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    after = load_llama(str(directory))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(after.model), nnx.state(before.model))
    index.write_text(json.dumps({"weight_map": where | {"model.norm.bias": file}}))
    with pytest.raises(WeightsError, match=r"no such file|model\.norm\.bias"):
        load_llama(str(directory))


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_tokenizer_template_and_end(tmp_path, kind):
    loaded = open_weights(str(written(kind, tmp_path)))
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    end = "<|end|>" if kind == "gguf" else "</s>"
    text = loaded.chat_template.render(messages)
    assert text == f"user: w1{end}assistant: w2{end}"
    assert loaded.end_ids == (0,)
    assert loaded.tokenizer.token_to_id(end) == 0
    if kind == "gguf":
        encoded = loaded.tokenizer.encode("hell23<|end|>", add_special_tokens=False)
        assert encoded.tokens == ["hell", "2", "3", "<|end|>"]
        assert loaded.tokenizer.decode(encoded.ids) == "hell23"


def test_truncation_and_padding_of_another_use_are_left_out(tmp_path):
    directory, tokenizer = tiny.write_directory(tmp_path / "model"), tiny.tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(directory / "tokenizer.json"))
    read = open_weights(str(directory)).tokenizer
    assert read.encode("w1 w2 w3").ids == [1, 2, 3]


def test_a_template_that_refuses(tmp_path):
    refusing = "{{ raise_exception('only a user speaks') }}"
    directory = tiny.write_directory(tmp_path / "model")
    (directory / "chat_template.jinja").write_text(refusing)
    template = open_weights(str(directory)).chat_template
    with pytest.raises(WeightsError, match="only a user speaks"):
        template.render([])


def test_all_misfits_in_one_report(tmp_path):
    for kind, q, norm, down in (
        ("safetensors", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight",
         "model.layers.0.mlp.down_proj.weight"),
        ("gguf", "blk.1.attn_q.weight", "output_norm.weight", "blk.0.ffn_down.weight"),
    ):  # fmt: skip
        tensors = tiny.weights("grouped_query")
        tensors["model.layers.1.self_attn.q_proj.weight"] = np.ones((24, 32), np.float32)
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        del tensors["model.layers.0.mlp.down_proj.weight"]
        path = written(kind, tmp_path, tensors=tensors)
        with pytest.raises(WeightsError) as error:
            load_llama(str(path))
        message = str(error.value)
        assert message.startswith(f"{path}: 3 tensors do not fit")
        assert f"{q} is (24, 32), expected (32, 32)" in message
        assert f"{norm} is (31,), expected (32,)" in message
        assert f"{down} is missing" in message


def test_tensors_of_another_model_are_refused(tmp_path):
    tensors = tiny.weights("grouped_query")
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(32, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    directory = tiny.write_directory(tmp_path / "model", tensors=tensors)
    with pytest.raises(WeightsError, match=r"1 tensors are no part.*q_proj\.bias$"):
        load_llama(str(directory))


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_files_that_are_cut_off(tmp_path, kind):
    path = written(kind, tmp_path)
    file = path if kind == "gguf" else path / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1000])
    with pytest.raises(WeightsError, match=r"tensors are cut off: .*weight") as error:
        load_llama(str(path))
    assert str(file) in str(error.value)
    for length in (0, 3, 40, 400):
        file.write_bytes(raw[:length])
        with pytest.raises(WeightsError, match="not a complete"):
            load_llama(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "unknown architecture: model_type must be 'llama', got 'mamba'"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type must be 'default', got 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}},
            "rope_parameters must be those of all layers, got some of full_attention, sliding_att",
        ),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "got some of full_att"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear"}},
            "rope_type must be 'default', got 'linear'",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta must be one"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta must be"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"sliding_window": 4096}, "sliding_window must be null, got 4096"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types must be 'full_attention'"),
        ({"use_qk_norm": True}, "use_qk_norm must be False, got True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping must be null, got 30.0"),
        ({"logits_scaling": 8.0}, "logits_scaling must be 1, got 8.0"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        ({"num_local_experts": 8}, "num_local_experts must be 0, got 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be null"),
        ({"head_dim": 16}, "hidden_size / num_attention_heads = 32 / 4, got 16"),
        ({"num_key_value_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"hidden_size": "32"}, "config.json"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, message):
    directory = tiny.write_directory(tmp_path / "model", **changes)
    with pytest.raises(WeightsError, match=message) as error:
        open_weights(str(directory))
    assert str(directory / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "general.architecture must be 'llama', got 'mamba'"),
        ({"turned": 4}, "llama.rope.dimension_count must be 8, got 4"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre one of gpt-2, smollm, got 'qwen2'"),
    ],
)
def test_other_gguf_files_are_refused(tmp_path, changes, message):
    with pytest.raises(WeightsError, match=message):
        open_weights(str(tiny.write_gguf(tmp_path / "model.gguf", **changes)))


def test_missing_files(tmp_path):
    with pytest.raises(
        WeightsError, match=r"neither a run, .* nor a model .* which has config\.json"
    ):
        open_weights(str(tmp_path))
    with pytest.raises(WeightsError, match="no such"):
        open_weights(str(tmp_path / "model.gguf"))
    directory = tiny.write_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        load_llama(str(directory))
    shutil.copy(directory / "config.json", directory / "tokenizer.json")
    with pytest.raises(WeightsError, match=r"tokenizer\.json: not a tokenizer file"):
        open_weights(str(directory))
