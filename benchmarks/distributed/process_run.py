"""Training of examples/llama in one process of `benchmarks.distributed.processes`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer, models

from examples.common.metrics import of_kind
from examples.llama.data import Splits
from examples.llama.distributed.processes import DistributedConfig, start
from examples.llama.loop import train
from examples.llama.run_config import RunConfig, run_preset


class RunSettings(NamedTuple):
    """Settings of the training, and number of the process."""

    preset: str
    batch_size: int
    seq_len: int
    steps: int
    processes: int
    process: int
    address: str  # of process 0


def run(**arguments: Any) -> dict[str, Any]:
    """Tokens a second of each step, by the clock of the program, and its last loss."""
    settings = RunSettings(**arguments)
    config = _config(settings)
    start(config.distributed)
    result = train(config, splits=_random_text(config.model.vocab_size, settings))
    steps = of_kind(result.records, "train")
    return {
        "tokens_per_second": [record["tokens_per_second"] for record in steps],
        "last_loss": steps[-1]["loss"],
        "devices": jax.device_count(),
    }


def _config(settings: RunSettings) -> RunConfig:
    several = DistributedConfig(
        coordinator_address=settings.address,
        num_processes=settings.processes,
        process_id=settings.process,
    )
    config = run_preset(settings.preset)
    return dataclasses.replace(
        config,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        output=dataclasses.replace(config.output, log_every=1, eval_every=settings.steps),
        distributed=several if settings.processes > 1 else DistributedConfig(),
    )


def _random_text(vocab_size: int, settings: RunSettings) -> Splits:
    """Random tokens: the time of a step does not depend on them."""
    random = np.random.default_rng(0)
    row = settings.seq_len + 1
    held_out = random.integers(0, vocab_size, row, np.int32)  # An evaluation is one batch.
    return Splits(
        train=random.integers(0, vocab_size, 100 * settings.batch_size * row, np.int32),
        validation=held_out,
        test=held_out,
        tokenizer=Tokenizer(models.BPE()),
        vocab_size=vocab_size,
        end_of_text=0,
        documents={"train": 1, "validation": 1, "test": 1},
        fingerprint="random",
    )
