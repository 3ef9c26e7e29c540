"""Perplexity of a whole split, every token weighing the same."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from examples.llama.training.train_step import Apply, token_nll


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def make_eval_step(apply: Apply) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A jitted `(params, tokens (B, T + 1), mask (B, T)) -> (summed nll, number of tokens)`."""

    @jax.jit
    def step(params, tokens, mask):
        return (token_nll(apply, params, tokens) * mask).sum(), mask.sum()

    return step


def mean_nll(
    eval_step: Callable,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    should_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Negative log-likelihood per token in nats: the sum over all batches by their tokens.

    The mean of the batches' means would weigh tokens of a short last batch too much. None if
    `should_stop`, asked before each batch, once the one before is computed, says so.
    """
    sums: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        # Steps are dispatched at once: only waiting for them lets a signal act before the last one.
        jax.block_until_ready(sums[-1:])
        if should_stop():
            return None
        sums.append(eval_step(params, batch["tokens"], batch["mask"]))
    nll, tokens = np.sum(np.array(sums, np.float64), axis=0)
    return float(nll / tokens)
