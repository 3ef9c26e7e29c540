"""Temporary memory of the compiled update, with and without the refresh in it."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng
import natgalore_jax._src.subspace.subspace as _subspace
from natgalore_jax._src.kernels.basis import new_basis


def update_memory(shape: tuple[int, int, int], rank: int, history: int) -> dict[str, Any]:
    """Bytes, from the compiler's own account; nothing is run.

    LAPACK's workspaces are allocated inside of its calls and are not in the account.

    Args:
      shape: (layers, m, n) of one stacked leaf, float32.
      rank: of the subspace, of the rows if m ≤ n.
      history: gradients kept for the natural gradient.

    Returns:
      For each optimizer the temporary bytes of the update with and without the refresh, and what
      one layer's refresh takes when it is compiled alone.
    """
    factories: dict[str, Callable[[], optax.GradientTransformation]] = {
        "galore": lambda: ng.galore_adamw(1e-2, rank=rank),
        "natural": lambda: (
            ng.chain(ng.natural_galore(rank, history=history), optax.adamw(1e-2))
            if history
            else ng.natural_galore_adamw(1e-2, rank=rank)
        ),
    }
    with_refresh = {name: _temporary_bytes(make(), shape) for name, make in factories.items()}
    with mock.patch.object(_subspace, "refresh", _no_refresh):
        without = {name: _temporary_bytes(make(), shape) for name, make in factories.items()}
    one_layer = _one_layer(shape[-2:], rank)
    return {
        "shape": list(shape),
        "rank": rank,
        "history": history,
        "one_layer_refresh_bytes": one_layer,
        "optimizers": {
            name: {
                "with_refresh_bytes": with_refresh[name],
                "without_refresh_bytes": without[name],
                "refresh_bytes": with_refresh[name] - without[name],
                "refresh_to_one_layer": (with_refresh[name] - without[name]) / one_layer,
            }
            for name in factories
        },
    }


def _temporary_bytes(tx: optax.GradientTransformation, shape: tuple[int, ...]) -> int:
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    # jit would find the program that it traced before under the same function.
    update = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    return _account(update.lower(params, state, params).compile())


def _no_refresh(settings, plans, gradients, bases, basis_states, **_):
    del settings, plans, gradients
    return list(bases), list(basis_states)


def _one_layer(shape: tuple[int, ...], rank: int) -> int:
    """Of a new basis for one matrix, in a program of its own."""
    m, n = min(shape), max(shape)
    arguments = (
        jax.ShapeDtypeStruct((m, n), jnp.float32),
        jax.ShapeDtypeStruct((m, min(rank, m)), jnp.float32),
        jax.ShapeDtypeStruct((), bool),
    )
    alone = jax.jit(lambda G, P, first: new_basis("power", G, P, jax.random.key(0), first))
    return _account(alone.lower(*arguments).compile())


def _account(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend gives no account of the memory of compiled programs")
    return analysis.temp_size_in_bytes
