"""A model, a text and a run so small that a whole training takes a moment."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from examples.common.metrics import of_kind
from examples.common.optimizers import OptimizerConfig
from examples.common.reporter import Reporter
from examples.llama.data import Splits
from examples.llama.model.config import ModelConfig
from examples.llama.result import Result
from examples.llama.run_config import OutputConfig, RunConfig

VOCAB = 48

MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden=16,
    intermediate=24,
    layers=2,
    heads=2,
    kv_heads=1,
    max_length=8,
    stacked=True,
)

# Refreshes fall on other steps than checkpoints, interruptions and ends of accumulations.
NATURAL_GALORE = OptimizerConfig(name="natural-galore", rank=4, update_interval=5)


def run_config(output: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """Eight steps of Natural GaLore on batches of 2 x 8 tokens."""
    config = RunConfig(
        steps=8,
        batch_size=2,
        seq_len=8,
        optimizer=NATURAL_GALORE,
        model=MODEL,
        output=OutputConfig(**{"eval_every": 4, "save_every": 3, **(output or {})}),
    )
    return dataclasses.replace(config, **changes)


def splits(seed: int = 0) -> Splits:
    """Text in which each token is followed by one of two."""
    random = np.random.default_rng(seed)

    def text(length: int) -> np.ndarray:
        return (np.cumsum(random.integers(1, 3, size=length)) % VOCAB).astype(np.int32)

    return Splits(
        train=text(2000),
        validation=text(101),
        test=text(90),
        tokenizer=Tokenizer(models.BPE()),
        vocab_size=VOCAB,
        end_of_text=0,
        documents={"train": 1, "validation": 1, "test": 1},
        fingerprint=f"tiny {seed}",
    )


def after(batches: int) -> Callable[[], bool]:
    """A `should_stop` that asks for a stop after so many batches, those of evaluations included."""
    counter = itertools.count()  # It is asked before the first one too.
    return lambda: next(counter) >= batches


class Notes(Reporter):
    """A reporter that keeps its notes."""

    def __init__(self):
        self.notes = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A limit on the size of files stands for the full disk: EFBIG instead of ENOSPC."""
    resource = pytest.importorskip("resource", reason="the limit is one of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_same_run(ours: Result, other: Result) -> None:
    """Losses, norms, weights and the structure of the state, up to rounding."""
    for kind, name in ("train", "loss"), ("train", "grad_norm"), ("validation", "loss"):
        actual, expected = (
            [record[name] for record in of_kind(result.records, kind)] for result in (ours, other)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert jax.tree.structure(ours.state) == jax.tree.structure(other.state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-4),
        ours.params,
        other.params,
    )


def assert_same_bits(a: Any, b: Any) -> None:
    """Two trees have the same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
