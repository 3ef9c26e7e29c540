"""New bases for the matrices that are due, and their companions carried over to them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from natgalore_jax._basis import PROBED, is_start
from natgalore_jax._divided_refresh import groups_of, refresh_group
from natgalore_jax._kernel import kernel, own_arithmetic
from natgalore_jax._layout import place_like, replicated
from natgalore_jax._linear_codes import load
from natgalore_jax._plan import LeafPlan
from natgalore_jax._refresh_layer import (
    Due,
    RefreshSettings,
    StoredFactors,
    is_companion,
    refresh_layer,
)
from natgalore_jax._schedule import due_layers
from natgalore_jax._scope import is_active, matrices_of


@own_arithmetic
def refresh(
    settings: RefreshSettings,
    plans: Sequence[LeafPlan],
    gradients: Sequence[jax.Array],
    bases: Sequence[StoredFactors],
    companions: Sequence[Any],
    step: jax.Array,
    accumulation: int = 1,
    axis_name: str | None = None,
    is_scheduled: jax.typing.ArrayLike = True,
) -> tuple[list[StoredFactors], list[Any]]:
    """Refreshes what is due at this step, and nothing else.

    A matrix is due at its first gradient that is finite and not zero, whenever that is, and from
    then on when the schedule says so: an expert without tokens at step 0 does not train in an
    arbitrary subspace for an interval. Its first refresh may also fall between the micro-batches
    of an accumulation, because what was accumulated before is zero.

    Each leaf has one loop over its due layers: a ``cond`` per layer would become a ``select`` under
    ``vmap`` and run every factorisation at every step. The loop works in place, one layer at a
    time, so its workspace is that of one layer. Matrices that are divided over the devices of a
    mesh with explicit axes are dealt out, each whole to one device (:func:`refresh_group`).

    Args:
      settings: when and how.
      plans, gradients, bases, companions: one entry for each projected leaf. A basis is one array
        per projected mode, or codes of one; companions are any pytree of
        :class:`natgalore_jax._refresh_layer.Companion`.
      step: scalar int32.
      accumulation: see :func:`due_layers`.
      axis_name: of devices that have gradients of their own, of which the mean counts. Those of the
        due layers alone are exchanged, one at a time.
      is_scheduled: scalar boolean; where it is False only first refreshes are due.

    Returns:
      The new bases and companions.
    """
    windows = [matrices_of(plan) for plan in plans]
    ranges = due_layers(
        [total for total, _ in windows],
        settings.update_interval,
        accumulation,
        stagger=settings.stagger,
        step=step,
    )
    due = [
        _due(plan, G, basis, start, limits, is_scheduled, axis_name)
        for plan, G, basis, (_, start), limits in zip(
            plans, gradients, bases, windows, ranges, strict=True
        )
    ]
    # By the step of the optimizer: accumulated inside or outside of the subspace, the same bases.
    step_key = jax.random.fold_in(jax.random.key(settings.seed), step // accumulation)
    new_bases, new_companions = list(bases), list(companions)
    dealt = groups_of(plans, gradients, bases, companions) if axis_name is None else []
    for numbers in dealt:
        found = refresh_group(
            settings,
            tuple(plans[i] for i in numbers),
            [gradients[i] for i in numbers],
            [bases[i] for i in numbers],
            [companions[i] for i in numbers],
            due=[due[i] for i in numbers],
            keys=[
                jax.vmap(functools.partial(matrix_key, settings.method, step_key, i))(
                    jnp.arange(plans[i].layers, dtype=jnp.int32)
                )
                for i in numbers
            ],
        )
        for i, (basis, own) in zip(numbers, found, strict=True):
            new_bases[i], new_companions[i] = basis, own
    # Zero always, but XLA cannot know: each loop waits for the one before. Otherwise the scheduler
    # of the CPU runs them at the same time, which takes the workspace of all of them together.
    turn = jnp.zeros([], jnp.int32)
    # The backward pass has the gradients of the last layers first: in their order a gradient can
    # be used and forgotten before the next one is made.
    for number in reversed(range(len(plans))):
        plan, (_, start) = plans[number], windows[number]
        if not is_active(plan) or any(number in numbers for numbers in dealt):
            continue
        nodes, treedef = jax.tree.flatten(companions[number], is_leaf=is_companion)
        new_bases[number], nodes, turn = _refresh_leaf(
            settings,
            plan.unnamed,
            axis_name,
            gradients[number],
            (bases[number], nodes, turn),
            due[number],
            start,
            number,
            step_key,
        )
        new_companions[number] = treedef.unflatten(nodes)
    return new_bases, new_companions


@kernel("settings", "plan", "axis_name", inline=False)
def _refresh_leaf(settings, plan, axis_name, G, carry, due, start, number, step_key):
    """The loop over the due layers of one parameter, whose first matrix has the number ``start``.

    ``carry`` is its basis, its companions and the turn, and so is what is returned.
    """
    layers = jnp.arange(plan.layers, dtype=jnp.int32)

    def next_due(after):
        return jnp.argmax(due.is_due & (layers > after)).astype(jnp.int32)

    def body(_, carry):
        basis, own, turn, layer = carry
        own_key = matrix_key(settings.method, step_key, number, start + layer)
        basis, own = refresh_layer(
            settings, plan, G, basis, own, layer, own_key, due.is_first[layer], axis_name
        )
        return basis, own, jnp.minimum(turn, layer), next_due(layer)

    def all_due(carry):
        return jax.lax.fori_loop(turn, end + turn, body, (*carry, next_due(-1)))[:3]

    turn, end = carry[2], jnp.sum(due.is_due, dtype=jnp.int32)
    # A loop of no iterations is not free on a CPU: a third of an ordinary step went there.
    return jax.lax.cond(end + turn > 0, all_due, lambda carry: carry, carry)


def matrix_key(
    method: str, step_key: jax.Array, leaf: jax.typing.ArrayLike, number: jax.typing.ArrayLike
) -> jax.Array:
    """The key of one matrix of a leaf at a step."""
    if method in PROBED:
        return step_key
    return jax.random.fold_in(jax.random.fold_in(step_key, leaf), number)


def _due(
    plan: LeafPlan,
    G: jax.Array,
    basis: StoredFactors,
    start: jax.typing.ArrayLike,
    limits: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
    is_scheduled: jax.typing.ArrayLike,
    axis_name: str | None,
) -> Due:
    """What is due of a parameter whose first matrix has the number ``start``."""
    mode, nb = plan.projected_modes[0], len(plan.batch)
    P = load(basis[0], plan.factor_shape(mode), jnp.float32, nb)
    started = ~is_start(jax.lax.index_in_dim(P, 0, -1, keepdims=False), nb)
    first_due = first_gradients(G, started, batch=plan.batch, axis_name=axis_name)
    first, end = limits
    number = jnp.arange(plan.layers, dtype=jnp.int32) + start
    is_within = jnp.logical_and((number >= first) & (number < end), is_scheduled)
    started, first_due = (replicated(x).reshape(-1) for x in (started, first_due))
    return Due(jnp.where(started, is_within, first_due), ~started)


@kernel("batch", "axis_name")
def first_gradients(
    G: jax.Array, started: jax.Array, *, batch: tuple[int, ...], axis_name: str | None
) -> jax.Array:
    """Which matrices have their first gradient that is finite and not zero.

    Args:
      G: of a parameter.
      started: batch, bool; if all have, G is not read.
      batch: the axes of independent matrices.
      axis_name: of devices that have gradients of their own.

    Returns:
      As ``started``.
    """
    axes = tuple(a for a in range(G.ndim) if a not in batch)

    def look(G):
        is_bad, is_nonzero = ~jnp.all(jnp.isfinite(G), axes), jnp.any(G != 0, axes)
        if axis_name is not None:
            counts = (x.astype(jnp.int32) for x in (is_bad, is_nonzero))
            is_bad, is_nonzero = (jax.lax.psum(x, axis_name) > 0 for x in counts)
        return place_like(is_nonzero & ~is_bad, started) & ~started

    return jax.lax.cond(jnp.all(started), lambda _: started & ~started, look, G)
