"""New bases for the matrices that are due, and their companions carried over to them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from natgalore_jax._divided_refresh import groups_of, refresh_group
from natgalore_jax._kernel import kernel, own_arithmetic
from natgalore_jax._plan import LeafPlan
from natgalore_jax._refresh_layer import (
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
) -> tuple[list[StoredFactors], list[Any]]:
    """Refreshes what is due at this step, and nothing else.

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

    Returns:
      The new bases and companions.
    """
    every_step = settings.method == "online"
    windows = [matrices_of(plan) for plan in plans]
    ranges = due_layers(
        [total for total, _ in windows],
        1 if every_step else settings.update_interval,
        1 if every_step else accumulation,
        stagger=settings.stagger,
        step=step,
    )
    step_key = jax.random.fold_in(jax.random.key(settings.seed), step)
    new_bases, new_companions = list(bases), list(companions)
    dealt = groups_of(plans, gradients, bases, companions) if axis_name is None else []
    for numbers in dealt:
        found = refresh_group(
            settings,
            tuple(plans[i] for i in numbers),
            [gradients[i] for i in numbers],
            [bases[i] for i in numbers],
            [companions[i] for i in numbers],
            ranges=[ranges[i] for i in numbers],
            keys=[jax.random.fold_in(step_key, i) for i in numbers],
            is_first=step == 0,
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
            ranges[number],
            start,
            jax.random.fold_in(step_key, number),
            step == 0,
        )
        new_companions[number] = treedef.unflatten(nodes)
    return new_bases, new_companions


@kernel("settings", "plan", "axis_name", inline=False)
def _refresh_leaf(settings, plan, axis_name, G, carry, due, start, key, is_first):
    """The loop over the due layers of one parameter, whose first matrix has the number ``start``.

    ``carry`` is its basis, its companions and the turn, and so is what is returned.
    """
    first, end = (jnp.clip(x - start, 0, plan.layers).astype(jnp.int32) for x in due)

    def body(layer, carry):
        basis, own, turn = carry
        own_key = jax.random.fold_in(key, start + layer)
        basis, own = refresh_layer(
            settings, plan, G, basis, own, layer, own_key, is_first, axis_name
        )
        return basis, own, jnp.minimum(turn, layer)

    def all_due(carry):
        return jax.lax.fori_loop(first + carry[2], end + carry[2], body, carry)

    # A loop of no iterations is not free on a CPU: a third of an ordinary step went there.
    return jax.lax.cond(end + carry[2] > first, all_due, lambda carry: carry, carry)
