"""One training run or one timing of an optimizer on this machine's device, in its own process."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.common.train_state import Params
from examples.llama.__main__ import parse
from examples.llama.data import load_splits, make_train_iterator
from examples.llama.memory.step_memory import of_compiled
from examples.llama.model.llama import INIT_STD
from examples.llama.training.build import (
    AbstractRun,
    abstract_run,
    make_step,
    on_the_host,
    placed_state,
)

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def device() -> dict[str, Any]:
    """The device of this process."""
    first = jax.local_devices()[0]
    stats = first.memory_stats() or {}
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "bytes_limit": stats.get("bytes_limit"),
    }


def train(arguments: list[str], steps: int) -> dict[str, Any]:
    """Steps on real tokens from random weights: losses, times and the peak of the allocator."""
    config = parse(arguments)
    run = abstract_run(config)
    batches = _batches(run)
    state = _first_state(run)
    initial_peak = _peak()
    step = make_step(config, run.apply, run.optimization, run.params)
    rows = next(batches)
    compiled = step.lower(state, rows).compile()
    memory = of_compiled(compiled, state, run.tx, config.per_layer)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = compiled(state, rows)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
        rows = next(batches)
    median = statistics.median(seconds[1:] or seconds)
    return {
        "predicted_bytes": None if memory is None else memory.to_dict(),
        "peak_bytes_in_use": _peak(),
        # Far below the peak, unless making the weights took more than training them.
        "initial_peak_bytes_in_use": initial_peak,
        "losses": losses,
        "step_s": seconds,
        "tokens_per_second": config.tokens_per_step / median,
    }


def update(arguments: list[str], steps: int) -> dict[str, Any]:
    """Times of the optimizer's update alone, whole steps of all parameters, on random gradients."""
    run = abstract_run(parse(arguments))
    state = _first_state(run)

    def step(params, opt_state, grads):
        updates, opt_state = run.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    grads = _random(run.params, 1)
    params, opt_state = state.params, state.opt_state
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, grads).compile()
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        params, opt_state = jax.block_until_ready(compiled(params, opt_state, grads))
        seconds.append(time.perf_counter() - start)
    seconds = seconds[1:]  # In the first one every basis is new.
    return {"median_s": statistics.median(seconds), "mean_s": statistics.mean(seconds)}


def _first_state(run: AbstractRun) -> Any:
    with on_the_host(run.config):
        params = _random(run.params, 0)
    return placed_state(run.config, run.optimization, params, {})


def _random(params: Params, seed: int) -> Params:
    """Normal numbers, one layer after the other: all at once take more memory than a step."""

    def make(key, x):
        if len(x.shape) < 2:
            return jnp.ones(x.shape, x.dtype)
        keys = jax.random.split(key, x.shape[0]) if len(x.shape) > 2 else key[None]
        shape = x.shape[1:] if len(x.shape) > 2 else x.shape

        def one(key):
            return (INIT_STD * jax.random.normal(key, shape)).astype(x.dtype)

        return jax.lax.map(one, keys).reshape(x.shape)

    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = jax.jit(make, static_argnums=1)
    return treedef.unflatten([made(key, x) for key, x in zip(keys, leaves, strict=True)])


def _batches(run: AbstractRun) -> Iterator[np.ndarray]:
    config = run.config
    splits = load_splits(config.data)
    if splits.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the text has {splits.vocab_size} tokens, the model {config.model.vocab_size}"
        )
    rows = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    for batch in make_train_iterator(splits.train, seed=0, **rows):
        yield batch["tokens"]


def _peak() -> int | None:
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def run(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Result of "device", "train" or "update", or that the memory was not enough."""
    try:
        return {"device": device, "train": train, "update": update}[task](**arguments)
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        return {"out_of_memory": str(error).splitlines()[0]}
