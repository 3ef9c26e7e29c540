import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.config import ModelConfig
from examples.llama.generate import generate
from examples.llama.model import Llama

CONFIG = ModelConfig(
    vocab_size=32, hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, max_length=16
)
PROMPT = jnp.array([[3, 1, 4], [1, 5, 9]], jnp.int32)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    """Its weights are large, so that it does not repeat one token."""
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p * 10 if p.ndim > 1 else p, state))
    return model


def constant_model(probabilities):
    """Whatever came before, the next token has these probabilities."""
    return jax.tree_util.Partial(
        lambda logits, ids: jnp.broadcast_to(logits, (*ids.shape, logits.size)),
        jnp.log(jnp.array(probabilities)),
    )


def test_greedy_is_the_argmax_step_by_step(model):
    logits = jax.jit(lambda model, ids: model(ids))
    expected = PROMPT
    for _ in range(6):
        token = jnp.argmax(logits(model, expected)[:, -1], axis=-1)
        expected = jnp.concatenate([expected, token[:, None]], axis=1)
    assert len(np.unique(expected[:, 3:])) > 4
    ids = generate(model, PROMPT, length=6, temperature=0.0, top_k=None, key=KEY)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_stacked_and_recomputed_layers_work(stacked):
    config = dataclasses.replace(CONFIG, stacked=stacked, remat=True)
    model = Llama(config, rngs=nnx.Rngs(0))
    ids = generate(model, PROMPT, length=2, temperature=0.0, top_k=None, key=KEY)
    np.testing.assert_array_equal(ids[:, 3], jnp.argmax(model(PROMPT)[:, -1], axis=-1))


def test_a_pure_function_of_parameters_works_as_the_model_does(model):
    graphdef, params = nnx.split(model, nnx.Param)

    def apply(params, tokens):
        return nnx.merge(graphdef, params)(tokens)

    pure = jax.tree_util.Partial(apply, nnx.to_pure_dict(params))
    for settings in ({"temperature": 0.0, "top_k": None}, {"temperature": 1.0, "top_k": 5}):
        expected = generate(model, PROMPT, length=5, key=KEY, **settings)
        np.testing.assert_array_equal(
            generate(pure, PROMPT, length=5, key=KEY, **settings), expected
        )


def test_new_parameters_do_not_compile_again(model):
    graphdef, params = nnx.split(model, nnx.Param)
    settings = {"length": 6, "temperature": 0.0, "top_k": None, "key": KEY}
    first = generate(model, PROMPT, **settings)
    compiled = generate._cache_size()
    other = nnx.merge(graphdef, jax.tree.map(lambda p: -p, params))
    assert not np.array_equal(generate(other, PROMPT, **settings), first)
    assert generate._cache_size() == compiled


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_distribution(temperature):
    probabilities = np.array([0.5, 0.25, 0.2, 0.05])
    ids = generate(
        constant_model(probabilities), jnp.zeros((200, 1), jnp.int32), 100, temperature, None, KEY
    )
    frequencies = np.bincount(np.ravel(ids[:, 1:]), minlength=4) / 20_000
    expected = probabilities ** (1 / temperature)
    # Four standard deviations of a frequency among 20,000.
    np.testing.assert_allclose(frequencies, expected / expected.sum(), rtol=0, atol=0.015)


def test_top_k_leaves_only_the_likeliest():
    model = constant_model([0.3, 0.1, 0.4, 0.2])
    ids = generate(model, jnp.zeros((50, 1), jnp.int32), 100, 1.0, 2, KEY)
    frequencies = np.bincount(np.ravel(ids[:, 1:]), minlength=4) / 5_000
    np.testing.assert_allclose(frequencies, [3 / 7, 0, 4 / 7, 0], rtol=0, atol=0.03)
    assert frequencies[1] == frequencies[3] == 0


def test_the_key_decides(model):
    def sample(key):
        return generate(model, PROMPT, 8, 1.0, None, key)

    np.testing.assert_array_equal(sample(KEY), sample(KEY))
    assert not np.array_equal(sample(KEY), sample(jax.random.key(1)))
    np.testing.assert_array_equal(sample(KEY)[:, :3], PROMPT)


def test_no_new_tokens_gives_the_prompt_back(model):
    np.testing.assert_array_equal(generate(model, PROMPT, 0, 1.0, None, KEY), PROMPT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative, got -1.0"),
        ({"top_k": 0}, "top_k must be at least 1 or None, got 0"),
        ({"length": 14}, "17 tokens, max_length=16"),
        ({"prompt_ids": PROMPT[:, :0]}, "at least one token"),
    ],
)
def test_bad_arguments_are_refused(model, change, message):
    arguments = {"prompt_ids": PROMPT, "length": 2, "temperature": 1.0, "top_k": None, "key": KEY}
    with pytest.raises(ValueError, match=message):
        generate(model, **(arguments | change))
