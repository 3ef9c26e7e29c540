"""Generation with a cache, against the model on whole rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_weights import stack_layers

from examples.llama.model import generate as generate_module
from examples.llama.model.adapters import AdapterConfig, make_linear
from examples.llama.model.config import ModelConfig
from examples.llama.model.decode import empty_caches, extend
from examples.llama.model.generate import Sampling, generate, pad_left, sample, stream
from examples.llama.model.llama import Llama, with_params

pytestmark = pytest.mark.usefixtures("fast_compile")

CONFIG = ModelConfig(
    vocab_size=32, hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, max_length=24
)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [7]]
KEY = jax.random.key(0)
run = jax.jit(lambda model, ids: model(ids))


def lively(model):
    """Its weights are large, so that it does not repeat one token."""
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p * 10 if p.ndim > 1 else p, state))
    return model


@pytest.fixture(scope="module")
def model(fast_compile):
    return lively(Llama(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def greedy(model):
    """The likeliest tokens after each prompt, from the whole row again for each."""
    rows = []
    for prompt in PROMPTS:
        row = list(prompt)
        for _ in range(6):
            # What comes later in the row has no influence: one program for all lengths.
            ids = jnp.array([row + [0] * (CONFIG.max_length - len(row))])
            row.append(int(jnp.argmax(run(model, ids)[0, len(row) - 1])))
        rows.append(row[len(prompt) :])
    assert len(np.unique(rows)) > 4
    return rows


@pytest.mark.parametrize("stacked", [False, True])
def test_logits_with_a_cache_equal_those_without(model, stacked):
    tokens = np.random.default_rng(0).integers(0, 32, (3, 12)).astype(np.int32)
    starts = np.array([0, 5, 2], np.int32)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    config = dataclasses.replace(CONFIG, stacked=stacked)
    model = with_params(config, stack_layers(params) if stacked else params)
    caches = empty_caches(config, rows=3, slots=14)

    @jax.jit
    def step(model, tokens, caches, slot):
        x, caches = extend(model, tokens, starts, caches, slot)
        return model.logits(x), caches

    parts, slot = [], 0
    for count in (6, 1, 1, 4):  # A prompt, two tokens, and a later part of a text.
        logits, caches = step(model, tokens[:, slot : slot + count], caches, slot)
        parts.append(logits)
        slot += count
    logits = jnp.concatenate(parts, axis=1)
    for row, start in enumerate(starts):
        expected = run(model, jnp.array([np.append(tokens[row, start:], np.zeros(start, int))]))
        np.testing.assert_allclose(
            logits[row, start:], expected[0, : 12 - start], rtol=0, atol=2e-5
        )
    assert jnp.std(logits) > 0.5


@pytest.mark.parametrize("together", [True, False])
def test_greedy_is_the_argmax_step_by_step(model, greedy, together):
    if together:
        found = generate(model, PROMPTS, 6, pad_to=8)
        assert found.tokens == greedy
        assert found.ended == [False] * 3
        assert found.steps == 6
    else:
        assert [generate(model, [p], 6, pad_to=8).tokens[0] for p in PROMPTS] == greedy


def test_a_row_stops_at_its_end_mark(model, greedy):
    ends = (greedy[0][2], greedy[1][4])
    found = generate(model, PROMPTS, 6, end_ids=ends, pad_to=8)
    for text, row, ended in zip(found.tokens, greedy, found.ended, strict=True):
        at = next((i for i, token in enumerate(row) if token in ends), None)
        assert text == row[:at]
        assert ended == (at is not None)
    assert found.ended[:2] == [True, True]


def test_all_stop_once_all_have_ended(model, greedy):
    found = generate(model, PROMPTS[:1], 6, end_ids=[greedy[0][2]], pad_to=8)
    assert found.steps <= 3
    assert found.ended == [True]


def test_it_stops_between_tokens_when_told(model):
    """Asked before each 16 tokens after the first one."""
    whole = generate(model, PROMPTS, 19, pad_to=8)
    answers = iter([False, True])
    found = generate(model, PROMPTS, 19, pad_to=8, should_stop=lambda: next(answers))
    assert found.steps == 17 and found.ended == [False] * len(PROMPTS)
    assert found.tokens == [row[:17] for row in whole.tokens]


def test_low_rank_layers_and_new_parameters(model):
    """Any model of the training program; other weights of one do not compile again."""
    linear = make_linear(AdapterConfig(kind="lora", rank=2))
    lora = Llama(CONFIG, rngs=nnx.Rngs(1, adapter=2), make_linear=linear)
    params = nnx.to_pure_dict(nnx.state(lora, nnx.Param))
    changed = jax.tree.map(lambda p: p * 10 if p.ndim > 1 else p, params)
    first = generate(lora, PROMPTS, 3, pad_to=8).tokens
    compiled = generate_module._write._cache_size()
    other = with_params(CONFIG, changed, linear)
    second = generate(other, PROMPTS, 3, pad_to=8).tokens
    assert generate_module._write._cache_size() == compiled
    assert first != second
    assert second[1][0] == int(jnp.argmax(run(other, jnp.array(PROMPTS[1:2]))[0, -1]))


def frequencies(probabilities, **settings):
    logits = jnp.broadcast_to(jnp.log(jnp.array(probabilities)), (20_000, len(probabilities)))
    tokens = sample(logits, Sampling(**settings), KEY)
    return np.bincount(tokens, minlength=len(probabilities)) / len(tokens)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.3, 0.1, 0.4, 0.2]),
        ({"temperature": 0.5}, [9 / 30, 1 / 30, 16 / 30, 4 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [3 / 7, 0, 4 / 7, 0]),
        ({"temperature": 1.0, "top_k": 9}, [0.3, 0.1, 0.4, 0.2]),
        # 0.4 + 0.3 is the first sum above 0.5; 0.6 is reached with them, and 0.75 with three.
        ({"temperature": 1.0, "top_p": 0.5}, [3 / 7, 0, 4 / 7, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [3 / 9, 0, 4 / 9, 2 / 9]),
        ({"temperature": 1.0, "top_p": 0.1}, [0, 0, 1, 0]),
        # Of the three likeliest, the two likeliest have 0.78.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [3 / 7, 0, 4 / 7, 0]),
    ],
)
def test_samples_have_the_distribution(settings, expected):
    # Four standard deviations of a frequency of 20,000 samples.
    found = frequencies([0.3, 0.1, 0.4, 0.2], **settings)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 0.5 / 20_000**0.5)
    np.testing.assert_array_equal(found > 0, np.array(expected) > 0)


def test_the_key_decides(model):
    def sampled(seed):
        sampling, key = Sampling(temperature=1.0), jax.random.key(seed)
        return generate(model, PROMPTS, 8, sampling=sampling, key=key, pad_to=8).tokens

    assert sampled(0) == sampled(0) != sampled(1)
    assert sampled(0)[0] != sampled(0)[1]


def test_prompts_are_padded_on_the_left():
    tokens, starts = pad_left(PROMPTS, 4)
    np.testing.assert_array_equal(starts, [5, 3, 7])
    np.testing.assert_array_equal(tokens[:, 3:], [[0, 0, 3, 1, 4], [1, 5, 9, 2, 6], [0] * 4 + [7]])
    assert tokens.shape == (3, 8)


def test_no_new_tokens(model):
    assert generate(model, PROMPTS, 0).tokens == [[], [], []]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "needs a prompt"),
        ({"prompts": [[1], []]}, "at least one token in each"),
        ({"prompts": [[1, 32]]}, "from 0 to 31, got 32"),
        ({"length": 20}, "a row of 25 tokens, its prompt included, max_length=24"),
        ({"length": -1}, "must not be negative"),
        ({"sampling": Sampling(temperature=0.5)}, "key is needed for temperature=0.5"),
    ],
)
def test_bad_arguments_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **({"prompts": PROMPTS, "length": 2} | change))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or from 1e-6 to 1e6, got -1.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"temperature": 1e-300}, "got 1e-300"),
        ({"top_k": 0}, "top_k must be at least 1 or None, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, or None, got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_a_stream_is_what_is_generated(model):
    """Up to the longest row, and up to an end mark."""
    sampled = {"sampling": Sampling(temperature=1.0, top_p=0.9), "key": KEY}
    whole = generate(model, [PROMPTS[1]], 18, pad_to=6, **sampled).tokens[0]
    assert list(stream(model, PROMPTS[1], 18, pad_to=6, **sampled)) == whole
    end = (whole[4], 99)
    found = generate(model, [PROMPTS[1]], 18, pad_to=6, end_ids=end, **sampled)
    assert found.ended == [True]
    assert list(stream(model, PROMPTS[1], 18, pad_to=6, end_ids=end, **sampled)) == found.tokens[0]
    assert list(stream(model, [1], 0)) == []
    with pytest.raises(ValueError, match="max_length=24"):
        next(stream(model, [1] * 20, 5))
