"""Seconds of compiled functions."""

import time
from collections.abc import Callable
from typing import Any

import jax
import optax


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """Wall time of one call, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


class Updater:
    """The update of one optimizer and nothing else: compiled beforehand, its state donated."""

    def __init__(self, tx: optax.GradientTransformation, grads: Any, params: Any):
        self.state = jax.jit(tx.init)(params)
        jitted = jax.jit(tx.update, donate_argnums=1)
        self.compiled = jitted.lower(grads, self.state, params).compile()
        self.samples: list[float] = []
        self.processor_samples: list[float] = []  # of all threads together

    def step(self, grads: Any, params: Any) -> None:
        """Take and time one step. The updates are dropped, so that their memory is reused."""
        start, processor = time.perf_counter(), time.process_time()
        updates, self.state = self.compiled(grads, self.state, params)
        jax.block_until_ready((updates, self.state))
        self.samples.append(time.perf_counter() - start)
        self.processor_samples.append(time.process_time() - processor)
