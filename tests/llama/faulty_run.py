"""Runs of a model of two matrices, in which some batches go wrong."""

import functools

import jax
import jax.numpy as jnp
import tiny_run as tiny

from examples.common.optimizers import OptimizerConfig
from examples.llama import loop
from examples.llama.data import make_train_iterator
from examples.llama.training.faults import FaultConfig

V = tiny.VOCAB


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def harm(x, amount, where):
    """x, whose gradient has `amount` for one element."""
    return x


harm.defvjp(
    lambda x, amount, where: (x, amount),
    lambda where, amount, g: (g.at[where].add(amount), None),
)


def bigrams(gradient=None, loss=None):
    """A model of two matrices; what batches beginning with a token do to gradient or loss."""

    def apply(params, tokens):
        first, amount = gradient or (V, 0.0)
        amount = jnp.where(tokens[0, 0] == first, amount, 0.0)
        table = harm(params["a"], amount, (3, 1))
        first, factor = loss or (V, 1.0)
        return (table @ params["b"])[tokens] * jnp.where(tokens[0, 0] == first, factor, 1.0)

    keys = jax.random.split(jax.random.key(0))
    params = {"a": jax.random.normal(keys[0], (V, 32)), "b": jax.random.normal(keys[1], (32, V))}
    return apply, params


def run_config(learning_rate=0.01, **changes):
    faults = {name: changes.pop(name) for name in list(changes) if hasattr(FaultConfig, name)}
    return tiny.run_config(
        steps=changes.pop("steps", 8),
        optimizer=OptimizerConfig(name="adamw", learning_rate=learning_rate),
        faults=FaultConfig(**faults),
        **changes,
    )


def batches(number):
    rows = make_train_iterator(tiny.splits().train, batch_size=2, seq_len=8, seed=0)
    return [next(rows)["tokens"] for _ in range(number)]


def rare(number, among=24):
    """The first token of a batch, if no other one begins with it; else of the next such batch."""
    first = [int(rows[0, 0]) for rows in batches(among)]
    return next((i, t) for i, t in enumerate(first) if i >= number and first.count(t) == 1)


def model(monkeypatch):
    """A fixture: runs train `bigrams`."""

    def use(**harms):
        monkeypatch.setattr(loop, "make_model", lambda *_: bigrams(**harms))

    return use
