"""One run, from its configuration to its result file."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.common.environment import environment
from benchmarks.common.result_files import write
from benchmarks.pretraining.corpora import name_of
from benchmarks.pretraining.methods import choose
from benchmarks.pretraining.run_spec import Run, prepare, was_made
from examples.common.errors import ConfigError
from examples.common.metrics import Record, of_kind
from examples.llama.data import load_splits
from examples.llama.loop import Result, train

_SEGMENT_ROWS = 8


def run(spec: Run) -> dict[str, Any] | None:
    """Train, write the file and return its content; None if the run was done already.

    Raises:
      ConfigError: if the run cannot be made, or its file is there with another configuration.
    """
    start = time.perf_counter()
    prepared = prepare(spec)
    if was_made(spec, prepared):
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
        "corpus": name_of(spec.corpus),
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


TRAIN_POINTS = 50
_COMPILING = 5  # first steps, whose times are not those of a step


def outcome(result: Result) -> dict[str, Any]:
    """Curves, losses, times and sizes of a run. A loss that is not finite is null.

    ``validation`` has [step, tokens, loss, seconds in training steps], ``train`` the mean loss of
    about 50 windows as [last step, loss].
    """
    train, validation, test = (
        of_kind(result.records, kind) for kind in ("train", "validation", "test")
    )
    losses = [finite(r["loss"]) for r in validation]
    seconds = [r["seconds"] for r in train]
    laps = [later - before for before, later in itertools.pairwise(seconds)]
    return {
        "parameters": sum(p.size for p in jax.tree.leaves(result.weights)),
        "state_bytes": state_bytes(result.state.opt_state),
        "steps_done": result.steps,
        "diverged": result.diverged or diverged(losses),
        "final_validation_loss": losses[-1] if result.finished and losses else None,
        "test_loss": finite(test[-1]["loss"]) if test else None,
        "step_seconds": round(statistics.median(laps[_COMPILING:] or laps or seconds), 5),
        "first_step_seconds": seconds[0],
        "training_seconds": seconds[-1],
        "validation": [
            [r["step"], r["tokens"], loss, round(r["seconds"], 2)]
            for r, loss in zip(validation, losses, strict=True)
        ],
        "train": thinned(train, TRAIN_POINTS),
    }


def diverged(losses: Sequence[float | None]) -> bool:
    """Whether a validation curve ends nowhere, or above where it began."""
    known = [loss for loss in losses if loss is not None]
    return len(known) < len(losses) or (len(known) > 1 and known[-1] > known[0])


def thinned(records: Sequence[Record], points: int) -> list[list[Any]]:
    """Mean losses of at most ``points`` windows of equal length, as [last step, loss]."""
    width = -(-len(records) // points)
    windows = [records[i : i + width] for i in range(0, len(records), width)]
    return [[w[-1]["step"], finite(statistics.fmean(r["loss"] for r in w))] for w in windows]


def state_bytes(state: optax.OptState) -> int:
    """Bytes of all arrays of an optimizer's state, without gradients that are being summed up."""
    if isinstance(state, optax.MultiStepsState):
        state = state.inner_opt_state
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def finite(value: float) -> float | None:
    """Five decimals of a number, or None: JSON has no infinity."""
    return round(value, 5) if math.isfinite(value) else None
