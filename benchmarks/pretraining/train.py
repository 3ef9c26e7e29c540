"""One run, from its configuration to its result file."""

import dataclasses
import time
from typing import Any

import numpy as np

from benchmarks.common.environment import environment
from benchmarks.common.result_files import is_done, write
from benchmarks.pretraining.corpora import resolve
from benchmarks.pretraining.methods import choose
from benchmarks.pretraining.record import outcome
from benchmarks.pretraining.run_spec import Run, prepare
from examples.common.errors import ConfigError
from examples.llama.data import load_splits
from examples.llama.loop import train

_SEGMENT_ROWS = 8


def run(spec: Run) -> dict[str, Any] | None:
    """Trains, writes the file and returns its content; None if the run was done already.

    Raises:
      ConfigError: if the run cannot be made, or its file is there with another configuration.
    """
    start = time.perf_counter()
    prepared = prepare(spec)
    if is_done(spec.path, prepared.configuration):
        return None
    splits = load_splits(prepared.config.data)
    validation = excerpt(
        splits.validation, prepared.validation_tokens, _SEGMENT_ROWS * prepared.config.seq_len
    )
    try:
        result = train(
            prepared.config,
            splits=dataclasses.replace(splits, validation=validation),
            tx=prepared.tx,
        )
    except ValueError as error:  # A rank that fits no matrix, say.
        raise ConfigError(f"{spec.method}: {error}") from error
    record = {
        "suite": spec.suite,
        "corpus": resolve(spec.corpus)[0],
        "preset": spec.preset,
        "method": spec.method,
        "label": choose(spec.method).method.label,
        "learning_rate": spec.learning_rate,
        "ratio": spec.ratio,
        "seed": spec.seed,
        "environment": environment(spec.seed),
        "workers": spec.workers,
        "configuration": prepared.configuration,
        "text": {
            "fingerprint": splits.fingerprint,
            "vocab_size": splits.vocab_size,
            "tokens": {n: len(getattr(splits, n)) for n in ("train", "validation", "test")},
        },
        **outcome(result),
        "wall_seconds": round(time.perf_counter() - start, 1),
    }
    write(record, spec.path)
    return record


def excerpt(tokens: np.ndarray, count: int, segment: int) -> np.ndarray:
    """About ``count`` of ``tokens``, in segments spread evenly over all of them.

    The beginning alone would be one document or two.
    """
    segments = -(-count // segment)
    if segments * segment >= len(tokens):
        return np.asarray(tokens)
    starts = np.linspace(0, len(tokens) - segment, segments).astype(int)
    return np.concatenate([tokens[i : i + segment] for i in starts])
