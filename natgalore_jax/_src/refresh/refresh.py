"""New bases for the matrices that are due for a refresh, and transport of their state.

Parameters of one kind share one program: a loop over the matrices that are due, which picks one,
refreshes it and puts it back. A program for each parameter would take the compiler as many times as
long, and so would one that differs between parameters by a constant, such as their number: XLA
compiles equal kernels once, so that here all numbers are data.
"""

import functools
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.kernels.basis import PROBED, is_start
from natgalore_jax._src.kernels.kernel import kernel, own_arithmetic
from natgalore_jax._src.kernels.linear_codes import load
from natgalore_jax._src.params.context import is_active, matrices_of
from natgalore_jax._src.params.placement import place_like, replicated
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.refresh.matrix import (
    Due,
    RefreshSettings,
    StoredFactors,
    put_matrix,
    refresh_matrix,
    take_matrix,
)
from natgalore_jax._src.refresh.schedule import due_matrices
from natgalore_jax._src.refresh.sharded import groups_of, refresh_group
from natgalore_jax._src.states.transport import is_basis_state

# A program for parameters of one kind takes at most so many of them, because to pick one of N it
# has N branches of N arguments, and at most so many bytes of gradients: they all have to be there
# when it runs, where a gradient alone can be used and freed before the next one is made.
MOST_PARAMETERS, MOST_BYTES = 64, 2**22


@own_arithmetic
def refresh(
    settings: RefreshSettings,
    plans: Sequence[LeafPlan],
    gradients: Sequence[jax.Array],
    bases: Sequence[StoredFactors],
    basis_states: Sequence[Any],
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

    Matrices are refreshed one at a time, in place: a ``cond`` for each would become a ``select``
    under ``vmap`` and run every refresh at every step, and the workspace is that of one matrix.
    Matrices that are divided over the devices of a mesh with explicit axes are dealt out, each
    whole to one device (:func:`refresh_group`).

    Args:
      settings: when and how.
      plans, gradients, bases, basis_states: one entry for each projected leaf. A basis is one array
        per projected mode, or codes of one; basis_states are any pytree of
        :class:`natgalore_jax._src.refresh.matrix.BasisState`.
      step: scalar int32.
      accumulation: see :func:`due_matrices`.
      axis_name: of devices that have gradients of their own, of which the mean counts. Those of the
        due matrices alone are exchanged, one at a time.
      is_scheduled: scalar boolean; where it is False only first refreshes are due.

    Returns:
      The new bases and basis-dependent states.
    """
    if not plans:
        return [], []
    totals, starts = zip(*map(matrices_of, plans), strict=True)
    begin, end = due_matrices(
        sum(totals), settings.update_interval, accumulation, stagger=settings.stagger, step=step
    )
    end = jnp.where(is_scheduled, end, begin)
    # The numbers of the first matrices of all parameters in the row of the schedule.
    offsets = np.cumsum((0, *totals[:-1]))
    # By the step of the optimizer: accumulated inside or outside of the subspace, the same bases.
    step_key = jax.random.fold_in(jax.random.key(settings.seed), step // accumulation)
    schedule = _Schedule(begin, end, step_key)

    new_bases, new_states = list(bases), list(basis_states)
    nodes, treedefs = zip(
        *(jax.tree.flatten(own, is_leaf=is_basis_state) for own in basis_states), strict=True
    )
    # Always 0, but opaque to XLA: serialises the loops, which bounds peak memory.
    turn = jnp.zeros([], jnp.int32)
    dealt = groups_of(plans, gradients, bases, basis_states) if axis_name is None else []
    for is_dealt, numbers in [(True, x) for x in dealt] + [
        (False, x) for x in _kinds(plans, gradients, bases, nodes, {i for x in dealt for i in x})
    ]:
        own_plans = tuple(plans[i] for i in numbers)
        place = _Place(
            leaf=jnp.asarray(numbers, jnp.int32),
            start=jnp.stack([jnp.asarray(starts[i], jnp.int32) for i in numbers]),
            offset=jnp.asarray(offsets[list(numbers)], jnp.int32),
        )
        own = [[x[i] for i in numbers] for x in (gradients, bases, nodes)]
        if is_dealt:
            found = _refresh_dealt(settings, own_plans, schedule, place, *own)
        else:
            *found, turn = _refresh_kind(
                settings, own_plans[0].unnamed, axis_name, schedule, place, *own, turn
            )
        for i, basis, leaves in zip(numbers, *found, strict=True):
            new_bases[i], new_states[i] = basis, treedefs[i].unflatten(leaves)
    return new_bases, new_states


class _Schedule(NamedTuple):
    """Matrices that are due for a refresh at a step: from ``begin`` to before ``end`` of all."""

    begin: jax.Array
    end: jax.Array
    key: jax.Array


class _Place(NamedTuple):
    """Positions of parameters among all parameters; int32, (parameters,)."""

    leaf: jax.Array  # the number of the parameter
    start: jax.Array  # the first of its matrices that is here, in per_layer
    offset: jax.Array  # of its matrices in the row of all


def _kinds(plans, gradients, bases, nodes, done) -> list[list[int]]:
    """The parameters that share a program, but for those that are done.

    The backward pass has the gradients of the last layers first, and so the last are refreshed
    first.
    """
    kinds: dict[Hashable, list[int]] = defaultdict(list)
    for i, plan in enumerate(plans):
        if is_active(plan) and i not in done:
            arrays, treedef = jax.tree.flatten((gradients[i], bases[i], nodes[i]))
            kinds[plan.unnamed, treedef, *map(jax.typeof, arrays)].append(i)
    shared = []
    for numbers in kinds.values():
        G = gradients[numbers[0]]
        most = max(1, min(MOST_PARAMETERS, MOST_BYTES // (G.size * G.dtype.itemsize)))
        shared += [numbers[max(end - most, 0) : end] for end in range(len(numbers), 0, -most)]
    return sorted(shared, key=max, reverse=True)


@kernel("settings", "plan", "axis_name", inline=False)
def _refresh_kind(settings, plan, axis_name, schedule, place, gradients, bases, basis_states, turn):
    """The loop over the due matrices of parameters of one kind.

    Returns:
      The new bases and basis-dependent states of each parameter, and the turn.
    """
    layers = plan.layers
    due = _due(plan, schedule, place, bases)

    def is_left(carry):
        return jnp.any(carry[0])

    def refresh_next(carry):
        left, bases, basis_states, turn = carry
        number = jnp.argmax(left).astype(jnp.int32) + turn
        leaf, layer = number // layers, number % layers
        take = [functools.partial(_take_one, plan, i) for i in range(len(gradients))]
        matrix = jax.lax.switch(leaf, take, layer, gradients, bases, basis_states)
        if axis_name is not None:
            matrix = matrix._replace(tensor=jax.lax.pmean(matrix.tensor, axis_name))
        own_key = matrix_key(
            settings.method, schedule.key, place.leaf[leaf], place.start[leaf] + layer
        )
        new = refresh_matrix(settings, plan, matrix, own_key, due.is_first[number])
        bases, basis_states = _put_one(plan, (bases, basis_states), new, leaf, layer)
        return left.at[number].set(False), bases, basis_states, jnp.minimum(turn, number)

    def refresh_all(carry):
        return jax.lax.while_loop(is_left, refresh_next, carry)

    carry = (due.is_due, list(bases), list(basis_states), turn)
    # A loop of no iterations is not free on a CPU: a third of an ordinary step went there.
    _, bases, basis_states, turn = jax.lax.cond(
        jnp.any(due.is_due) | (turn > 0), refresh_all, lambda carry: carry, carry
    )
    return bases, basis_states, turn


def _take_one(plan, i, layer, gradients, bases, basis_states):
    return take_matrix(plan, gradients[i], bases[i], basis_states[i], layer)


def _put_one(plan, stored, new, leaf, layer):
    """Bases and basis-dependent state, with one matrix of parameter number ``leaf`` replaced.

    The number counts down on the way through the parameters, so that what each one compiles to is
    the same.
    """
    bases, basis_states = list(stored[0]), list(stored[1])
    if len(bases) == 1:
        own = put_matrix(plan, (bases[0], basis_states[0]), new, layer)
        return [own[0]], [own[1]]

    def put(left, own, new):
        return left - 1, put_matrix(plan, own, new, layer)

    def keep(left, own, new):
        return left - 1, own

    left = leaf
    for i, own in enumerate(zip(bases, basis_states, strict=True)):
        left, (bases[i], basis_states[i]) = jax.lax.cond(left == 0, put, keep, left, own, new)
    return bases, basis_states


def _refresh_dealt(settings, plans, schedule, place, gradients, bases, basis_states):
    """Refresh of parameters that are sharded over devices."""
    plan = plans[0]
    is_due, is_first = (x.reshape(len(plans), -1) for x in _due(plan, schedule, place, bases))
    first = [
        first_gradients(G, ~x.reshape(plan.batch_shape), batch=plan.batch)
        for G, x in zip(gradients, is_first, strict=True)
    ]
    first = jnp.stack([replicated(x).reshape(-1) for x in first])
    due = Due(jnp.where(is_first, first, is_due), is_first)
    keys = _keys(settings, plan, schedule, place).reshape(len(plans), -1)
    found = refresh_group(
        settings,
        plans,
        gradients,
        bases,
        basis_states,
        due=[Due(*x) for x in zip(*due, strict=True)],
        keys=list(keys),
    )
    return zip(*found, strict=True)


def _due(plan: LeafPlan, schedule: _Schedule, place: _Place, bases: Sequence[Any]) -> Due:
    """Matrices of one kind that are due for a refresh: (parameters · layers,)."""
    mode, nb = plan.projected_modes[0], len(plan.batch)
    columns = [
        jax.lax.slice_in_dim(load(P[0], plan.factor_shape(mode), jnp.float32, nb), 0, 1, axis=-1)
        for P in bases
    ]
    column = jnp.moveaxis(jnp.concatenate(columns, axis=-1), -1, 0)
    is_first = replicated(is_start(column, nb + 1)).reshape(-1)
    number = (place.offset + place.start)[:, None] + jnp.arange(plan.layers, dtype=jnp.int32)
    is_within = (number >= schedule.begin) & (number < schedule.end)
    return Due(is_within.reshape(-1) | is_first, is_first)


def _keys(settings, plan, schedule, place):
    """The keys of all matrices of parameters of one kind, (parameters · layers,)."""
    number = place.start[:, None] + jnp.arange(plan.layers, dtype=jnp.int32)
    leaf = jnp.broadcast_to(place.leaf[:, None], number.shape)
    of_matrix = functools.partial(matrix_key, settings.method, schedule.key)
    return jax.vmap(of_matrix)(leaf.reshape(-1), number.reshape(-1))


def matrix_key(
    method: str, step_key: jax.Array, leaf: jax.typing.ArrayLike, number: jax.typing.ArrayLike
) -> jax.Array:
    """The key of one matrix of a leaf at a step."""
    if method in PROBED:
        return step_key
    return jax.random.fold_in(jax.random.fold_in(step_key, leaf), number)


@kernel("batch")
def first_gradients(G: jax.Array, started: jax.Array, *, batch: tuple[int, ...]) -> jax.Array:
    """Matrices with their first gradient that is finite and not zero.

    Args:
      G: of a parameter.
      started: batch, bool; if all have, G is not read.
      batch: the axes of independent matrices.

    Returns:
      As ``started``.
    """
    axes = tuple(a for a in range(G.ndim) if a not in batch)

    def look(G):
        is_bad, is_nonzero = ~jnp.all(jnp.isfinite(G), axes), jnp.any(G != 0, axes)
        return place_like(is_nonzero & ~is_bad, started) & ~started

    return jax.lax.cond(jnp.all(started), lambda _: started & ~started, look, G)
