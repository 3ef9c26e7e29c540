"""New bases for the matrices that are due, and their companions carried over to them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from natgalore_jax._basis import new_basis
from natgalore_jax._contract import has_explicit_sharding
from natgalore_jax._linear_codes import Stored, load, store
from natgalore_jax._plan import LeafPlan
from natgalore_jax._schedule import due_layers
from natgalore_jax._scope import is_active, matrices_of


@dataclasses.dataclass(frozen=True)
class RefreshSettings:
    """The arguments of ``low_rank_project`` that decide when and how a basis changes."""

    update_interval: int
    method: str
    transition: str
    stagger: bool
    seed: int


class Companion(Protocol):
    """Something stored in the coordinates of a basis: a moment, a history.

    It is a pytree whose arrays have the batch axes of the parameter first.
    """

    def moved(self, transition: str, C_of_axis: Mapping[int, jax.Array]) -> "Companion":
        """One matrix's companion, without batch axes, in the coordinates of the new basis."""
        ...


Factors = tuple[jax.Array, ...]
StoredFactors = tuple[Stored, ...]


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
    time, so its workspace is that of one layer.

    Args:
      settings: when and how.
      plans, gradients, bases, companions: one entry for each projected leaf. A basis is one array
        per projected mode, or codes of one; companions are any pytree of :class:`Companion`.
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
    # Zero always, but XLA cannot know: each loop waits for the one before. Otherwise the scheduler
    # of the CPU runs them at the same time, which takes the workspace of all of them together.
    turn = jnp.zeros([], jnp.int32)
    # The backward pass has the gradients of the last layers first: in their order a gradient can
    # be used and forgotten before the next one is made.
    for number in reversed(range(len(plans))):
        plan, G, (_, start) = plans[number], gradients[number], windows[number]
        if not is_active(plan):
            continue
        leaf_key = jax.random.fold_in(step_key, number)
        first, end = (jnp.clip(jnp.asarray(x) - start, 0, plan.layers) for x in ranges[number])

        def body(layer, carry, plan=plan, G=G, leaf_key=leaf_key, start=start):
            basis, own, turn = carry
            key = jax.random.fold_in(leaf_key, start + layer)
            tensor = _layer_of(plan, G, layer)
            if axis_name is not None:
                tensor = jax.lax.pmean(tensor, axis_name)
            basis, own = _refresh_layer(settings, plan, tensor, basis, own, layer, key, step == 0)
            return basis, own, jnp.minimum(turn, layer)

        def all_due(carry, body=body, first=first, end=end):
            return jax.lax.fori_loop(first + carry[2], end + carry[2], body, carry)

        # A loop of no iterations is not free on a CPU: a third of an ordinary step went there.
        carry = (bases[number], companions[number], turn)
        new_bases[number], new_companions[number], turn = jax.lax.cond(
            end + turn > first, all_due, lambda carry: carry, carry
        )
    return new_bases, new_companions


def _index_of(plan: LeafPlan, layer: jax.Array) -> tuple[jax.Array, ...]:
    return jnp.unravel_index(layer, plan.batch_shape) if plan.batch else ()


def _layer_of(plan: LeafPlan, G: jax.Array, layer: jax.Array) -> jax.Array:
    """One layer of a gradient, its axes in the order of the modes."""
    index = _index_of(plan, layer)
    kept = [a for a in range(G.ndim) if a not in plan.batch]
    for axis, i in sorted(zip(plan.batch, index, strict=True), reverse=True, key=lambda x: x[0]):
        G = jax.lax.dynamic_index_in_dim(G, i, axis, keepdims=False)
    return G.transpose([kept.index(a) for mode in plan.modes for a in mode])


def _refresh_layer(settings, plan, tensor, basis, companions, layer, key, is_first):
    index = _index_of(plan, layer)
    new_factors, C_of_axis = [], {}
    for number, (mode, stacked) in enumerate(zip(plan.projected_modes, basis, strict=True)):
        U, shape = _take_tree(stacked, index), (*plan.mode_shape(mode), plan.rank_of(mode))
        P = load(U, shape, jnp.float32).reshape(plan.mode_sizes[mode], -1)
        P_new = new_basis(
            settings.method,
            _unfold(plan, _replicated(tensor), mode),
            P,
            jax.random.fold_in(key, number),
            is_first,
            is_right=len(plan.modes) == 2 and mode == 1,
        )
        # As it is stored, as all steps to come will read it.
        U_new = store(P_new.reshape(shape), U)
        P_new = load(U_new, shape, jnp.float32).reshape(P.shape)
        C_of_axis[plan.low_rank_axes[mode]] = jnp.matmul(
            P_new.T, P, precision="highest", preferred_element_type=jnp.float32
        )
        new_factors.append(_put_tree(stacked, U_new, index))
    if settings.transition == "keep":
        return tuple(new_factors), companions
    moved = jax.tree.map(
        lambda c: _put_tree(c, _take_tree(c, index).moved(settings.transition, C_of_axis), index),
        companions,
        is_leaf=lambda x: hasattr(x, "moved"),
    )
    return tuple(new_factors), moved


def _unfold(plan: LeafPlan, tensor: jax.Array, mode: int) -> jax.Array:
    """The tensor as a matrix whose rows are one mode; the axes are in the order of the modes."""
    start = sum(len(axes) for axes in plan.modes[:mode])
    rows = range(start, start + len(plan.modes[mode]))
    order = [*rows, *(a for a in range(tensor.ndim) if a not in rows)]
    tensor = tensor.transpose(order)
    if tensor.ndim == 2:
        return tensor
    return tensor.reshape(plan.mode_sizes[mode], math.prod(tensor.shape[len(rows) :]))


def _replicated(x: jax.Array) -> jax.Array:
    """Factorisations need whole matrices; on explicit meshes this has to be said."""
    if not has_explicit_sharding(x):
        return x
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec())


def _take(array: jax.Array, index: tuple) -> jax.Array:
    for i in index:
        array = jax.lax.dynamic_index_in_dim(array, i, 0, keepdims=False)
    return array


def _put(array: jax.Array, value: jax.Array, index: tuple) -> jax.Array:
    if not index:
        return value
    starts = (*index, *([0] * value.ndim))
    value = value.reshape((1,) * len(index) + value.shape).astype(array.dtype)
    return jax.lax.dynamic_update_slice(array, value, starts)


def _take_tree(tree: Any, index: tuple) -> Any:
    return jax.tree.map(lambda x: _take(x, index), tree)


def _put_tree(tree: Any, value: Any, index: tuple) -> Any:
    return jax.tree.map(lambda x, v: _put(x, v, index), tree, value)
