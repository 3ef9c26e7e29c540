"""What both pages train: a small LLaMA, on the presidential addresses."""

import dataclasses
import os
from collections.abc import Iterator

import jax
import numpy as np
import optax
from flax import nnx

from examples.common.accelerators import announce_devices
from examples.common.errors import ConfigError
from examples.common.train_state import Params
from examples.llama.data import DataConfig, load_splits, make_train_iterator
from examples.llama.model.config import MODEL_PRESETS, ModelConfig
from examples.llama.model.llama import Llama, with_params
from examples.llama.training.train_step import token_nll

MODEL = dataclasses.replace(MODEL_PRESETS["nano"], stacked=True)
RANK = 32
ROWS = 16
"""Rows in a batch."""
LEARNING_RATE = optax.linear_schedule(0.0, 0.005, 20)


def initial(key: jax.Array, model: ModelConfig = MODEL) -> Params:
    """First weights, as nested dicts; the layers are in one stack."""
    return nnx.to_pure_dict(nnx.state(Llama(model, rngs=nnx.Rngs(key)), nnx.Param))


def mean_loss(params: Params, rows: jax.Array, model: ModelConfig = MODEL) -> jax.Array:
    """Mean negative log-likelihood in nats of rows (B, T + 1)."""
    return token_nll(lambda p, tokens: with_params(model, p)(tokens), params, rows).mean()


def batches(rows: int = ROWS, model: ModelConfig = MODEL) -> Iterator[np.ndarray]:
    """Rows (B, T + 1) without end: each process its share of each batch."""
    splits = load_splits(DataConfig(vocab_size=model.vocab_size))
    iterator = make_train_iterator(
        splits.train,
        batch_size=rows,
        seq_len=model.max_length,
        seed=0,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (batch["tokens"] for batch in iterator)


def devices(simulated: int | None) -> list[jax.Device]:
    """All that there are, or so many simulated ones on a CPU; before any other use of one.

    Raises:
      ConfigError: if there is none, or a batch cannot be divided among them.
    """
    if simulated is not None:
        _check_number(simulated)
        # Simulated devices wait for one another in the threads of one pool.
        os.environ.setdefault("NPROC", "32")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated)
    announce_devices(print)
    found = jax.devices()
    _check_number(len(found))
    return found


def _check_number(devices: int) -> None:
    if devices < 1 or ROWS % devices:
        raise ConfigError(f"--devices must divide the {ROWS} rows of a batch, got {devices}")
