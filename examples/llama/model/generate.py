"""Continue prompts, one token after the other."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama.model.decode import Caches, empty_caches, extend, slots_of
from examples.llama.model.llama import Llama


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Choice of a token.

    Raises:
      ValueError: if a number is out of its range.
    """

    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's distribution, and less than 1 from a
    sharper one."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only; None is all of them."""
    top_p: float | None = None
    """Sample among the fewest tokens, likeliest first, whose probabilities sum to p, after the
    temperature and top_k; None is all of them."""

    def __post_init__(self) -> None:
        # Logits are divided by it in float32, where it and their quotient have to be numbers.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(f"temperature must be 0 or from 1e-6 to 1e6, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or None, got {self.top_p}")


def sample(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Tokens (B,) int32 from logits (B, V)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.random.categorical(key, scaled).astype(jnp.int32)
    count = logits.shape[-1] if sampling.top_k is None else min(sampling.top_k, logits.shape[-1])
    likeliest, candidates = jax.lax.top_k(scaled, count)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(likeliest)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        likeliest = jnp.where(before < sampling.top_p, likeliest, -jnp.inf)
    choice = jax.random.categorical(key, likeliest)
    return jnp.take_along_axis(candidates, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


PAD_TO = 64
_AT_ONCE = 16  # Tokens between two questions whether to stop.
GREEDY = Sampling()


class Generated(NamedTuple):
    """Generated tokens, and their time: the first call of a shape compiles in that time."""

    tokens: list[list[int]]  # New tokens of each row, without the end mark.
    ended: list[bool]  # Whether a row came to an end mark; if not, it was cut off.
    prompt_seconds: float  # Until the first new token of every row.
    seconds: float  # All tokens after it.
    steps: int  # How many tokens the longest row has, its end mark included.

    @property
    def tokens_per_second(self) -> float:
        """After the first token, in one row."""
        return (self.steps - 1) / self.seconds if self.steps > 1 else 0.0


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    sampling: Sampling = GREEDY,
    end_ids: Sequence[int] = (),
    key: jax.Array | None = None,
    pad_to: int = PAD_TO,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generated:
    """Continues each prompt by at most `length` tokens.

    A row depends on no other but for its random numbers. Rows that have ended are computed on
    until all have, or `length` is reached. Layers that are not stacked are faster: a stack is cut
    into its layers again for every token.

    Args:
      model: the model, for example `load_llama(...).model`.
      prompts: token ids, at least one in each.
      length: the most tokens to add.
      sampling: how tokens are chosen; by default the likeliest.
      end_ids: tokens that end a row, such as `load_llama(...).end_ids`.
      key: a random key; needed unless the temperature is 0.
      pad_to: prompts are padded, on the left, to a multiple of so many tokens: the programs are
        compiled for each number of rows, padded width and `length`.
      should_stop: asked every 16 tokens; once true, rows are cut off there.

    Raises:
      ValueError: if there is no prompt or an empty one, a row would be longer than the model's
        max_length, a token is none of the vocabulary, or the key is missing.
    """
    _check(model, prompts, length, sampling, key, pad_to)
    if length == 0:
        return Generated([[] for _ in prompts], [False] * len(prompts), 0.0, 0.0, 0)
    key = jax.random.key(0) if key is None else key
    ends = tuple(end_ids)
    tokens, starts = pad_left(prompts, pad_to)
    begin = time.perf_counter()
    first, caches = _read(model, tokens, starts, key, length, sampling)
    jax.block_until_ready(first)
    middle = time.perf_counter()
    progress = _begin(first, caches, length, ends)
    while (steps := int(progress.step)) < length and not np.all(progress.ended):
        if should_stop():
            break
        until = min(steps + _AT_ONCE, length)
        progress = _write(model, progress, starts, key, until, sampling, ends)
    rows = np.asarray(progress.tokens)[:, :steps].tolist()
    seconds = time.perf_counter() - middle
    texts = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
    ended = [len(text) < len(row) for text, row in zip(texts, rows, strict=True)]
    return Generated(texts, ended, middle - begin, seconds, steps)


def stream(
    model: Llama,
    prompt: Sequence[int],
    length: int,
    *,
    sampling: Sampling = GREEDY,
    end_ids: Sequence[int] = (),
    key: jax.Array | None = None,
    pad_to: int = PAD_TO,
) -> Iterator[int]:
    """The tokens that :func:`generate` adds to one prompt, each as soon as it is known.

    The arguments and errors are those of :func:`generate`.
    """
    _check(model, [prompt], length, sampling, key, pad_to)
    if length == 0:
        return
    key = jax.random.key(0) if key is None else key
    tokens, starts = pad_left([prompt], pad_to)
    token, caches = _read(model, tokens, starts, key, length, sampling)
    for step in range(1, length + 1):
        if int(token[0]) in end_ids:
            return
        yield int(token[0])
        if step < length:
            slot = tokens.shape[1] + step - 1
            token, caches = _next(model, token, starts, caches, slot, key, step, sampling)


def pad_left(prompts: Sequence[Sequence[int]], multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, T) int32 with zeros on the left, and where each row starts, (B,) int32."""
    width = -(-max(map(len, prompts)) // multiple) * multiple
    starts = np.array([width - len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return tokens, starts


@functools.partial(jax.jit, static_argnames=("length", "sampling"))
def _read(
    model: Llama,
    tokens: jax.Array,
    starts: jax.Array,
    key: jax.Array,
    length: int,
    sampling: Sampling,
) -> tuple[jax.Array, Caches]:
    """The first new token of each row (B,), and caches with room for the others."""
    caches = empty_caches(model.config, tokens.shape[0], tokens.shape[1] + length - 1)
    x, caches = extend(model, tokens, starts, caches, 0)
    return sample(model.logits(x[:, -1]), sampling, jax.random.fold_in(key, 0)), caches


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="caches")
def _next(
    model: Llama,
    token: jax.Array,
    starts: jax.Array,
    caches: Caches,
    slot: jax.Array | int,
    key: jax.Array,
    step: jax.Array | int,
    sampling: Sampling,
) -> tuple[jax.Array, Caches]:
    """The token after the one in `slot`, of each row (B,)."""
    x, caches = extend(model, token[:, None], starts, caches, slot)
    return sample(model.logits(x[:, 0]), sampling, jax.random.fold_in(key, step)), caches


class _Progress(NamedTuple):
    """Rows that are being written."""

    step: jax.Array  # new tokens of each row. shape=(), dtype=jnp.int32.
    tokens: jax.Array  # (B, length); those from `step` on are zeros.
    ended: jax.Array  # (B,): whether a row has come to an end mark.
    caches: Caches


def _begin(first: jax.Array, caches: Caches, length: int, ends: tuple[int, ...]) -> _Progress:
    tokens = jnp.zeros((first.shape[0], length), jnp.int32).at[:, 0].set(first)
    ended = jnp.isin(first, jnp.array(ends, jnp.int32))
    return _Progress(jnp.ones([], jnp.int32), tokens, ended, caches)


@functools.partial(jax.jit, static_argnames=("sampling", "ends"), donate_argnames="progress")
def _write(
    model: Llama,
    progress: _Progress,
    starts: jax.Array,
    key: jax.Array,
    until: jax.Array | int,
    sampling: Sampling,
    ends: tuple[int, ...],
) -> _Progress:
    """The same rows with `until` new tokens, or fewer if all of them end before."""
    width = slots_of(progress.caches) - (progress.tokens.shape[1] - 1)
    ids = jnp.array(ends, jnp.int32)

    def write_token(progress):
        step, tokens, ended, caches = progress
        before, slot = tokens[:, step - 1], width + step - 1
        token, caches = _next(model, before, starts, caches, slot, key, step, sampling)
        if ends:  # After its end a row repeats the end mark.
            token = jnp.where(ended, ids[0], token)
        ended |= jnp.isin(token, ids)
        return _Progress(step + 1, tokens.at[:, step].set(token), ended, caches)

    def goes_on(progress):
        return (progress.step < until) & ~jnp.all(progress.ended)

    return jax.lax.while_loop(goes_on, write_token, progress)


def _check(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    length: int,
    sampling: Sampling,
    key: jax.Array | None,
    pad_to: int,
) -> None:
    if not prompts or min(map(len, prompts)) < 1:
        raise ValueError("generate needs a prompt, and at least one token in each")
    if length < 0 or pad_to < 1:
        raise ValueError(f"length must not be negative and pad_to at least 1: {length}, {pad_to}")
    longest, most = max(map(len, prompts)) + length, model.config.max_length
    if longest > most:
        raise ValueError(f"a row of {longest} tokens, its prompt included, max_length={most}")
    size = model.config.vocab_size
    strange = [token for prompt in prompts for token in prompt if not 0 <= token < size]
    if strange:
        raise ValueError(f"tokens must be from 0 to {size - 1}, got {strange[0]}")
    if sampling.temperature > 0 and key is None:
        raise ValueError(f"a random key is needed for temperature={sampling.temperature}")
