"""What a run comes to, as JSON values."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import optax

from examples.common.metrics import Record, of_kind
from examples.llama.loop import Result

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
