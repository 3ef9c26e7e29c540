"""New bases for the matrices that are due for a refresh, and transport of their state.

Parameters of one kind share one program, a loop over the matrices that are due: one program per
parameter would multiply the compile time. XLA compiles equal kernels once, and constants such as
the number of a parameter would make kernels differ; therefore all numbers are data.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.kernels.basis import PROBED, is_start, is_usable
from natgalore_jax._src.kernels.kernel import kernel, own_arithmetic
from natgalore_jax._src.kernels.linear_codes import load
from natgalore_jax._src.kernels.stacks import bytes_of, kinds, most_in_stack, stack, unstack
from natgalore_jax._src.params.context import is_active, matrices_of
from natgalore_jax._src.params.placement import (
    AxisName,
    Names,
    place_like,
    replicated,
    vary,
    varying_axes,
)
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.refresh.matrix import (
    Due,
    Matrix,
    RefreshSettings,
    StoredFactors,
    put_matrix,
    refresh_matrix,
    take_stored,
    take_tensor,
)
from natgalore_jax._src.refresh.schedule import due_matrices
from natgalore_jax._src.refresh.sharded import groups_of, refresh_group
from natgalore_jax._src.states.transport import is_basis_state

# Parameters that share a program have at most this share of all bytes. Their gradients are kept
# until the last one is computed, and in a step with a refresh bases and states are copied.
PROGRAM_SHARE = 1 / 16


@own_arithmetic
def refresh(
    settings: RefreshSettings,
    plans: Sequence[LeafPlan],
    gradients: Sequence[jax.Array],
    bases: Sequence[StoredFactors],
    basis_states: Sequence[Any],
    step: jax.Array,
    accumulation: int = 1,
    axis_name: AxisName | None = None,
    is_scheduled: jax.typing.ArrayLike = True,
) -> tuple[list[StoredFactors], list[Any]]:
    """Refresh the matrices that are due at this step.

    A matrix is due for its first refresh at its first finite, non-zero gradient, and from then on
    by the schedule: an expert without tokens at step 0 does not train in an arbitrary subspace for
    an interval. A first refresh may also fall between the micro-batches of an accumulation, because
    the accumulated gradient is zero until then.

    Matrices are refreshed one at a time, in place, with the workspace of one matrix: a ``cond`` for
    each would become a ``select`` under ``vmap`` and run every refresh at every step. Matrices that
    are sharded on a mesh with explicit axes are resharded so that each device refreshes whole
    matrices (:func:`refresh_group`).

    Args:
      settings: of the refresh.
      plans, gradients, bases, basis_states: one entry for each projected leaf. A basis is one array
        per projected mode, or its codes; basis_states are any pytree of
        :class:`natgalore_jax._src.states.transport.BasisState`.
      step: scalar int32.
      accumulation: see :func:`due_matrices`.
      axis_name: of devices with different gradients, whose mean is used; one mesh axis or several.
        Only gradients of matrices that are due are summed over the devices, one at a time, or one
        on each device of a group.
      is_scheduled: scalar boolean; if False, only first refreshes are due.

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
    # Position of the first matrix of each parameter in the schedule.
    offsets = np.cumsum((0, *totals[:-1]))
    # From the optimizer's step: the bases do not depend on where gradients are accumulated.
    step_key = jax.random.fold_in(jax.random.key(settings.seed), step // accumulation)
    schedule = _Schedule(begin, end, step_key)

    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    new_bases, new_states = list(bases), list(basis_states)
    nodes, treedefs = zip(
        *(jax.tree.flatten(own, is_leaf=is_basis_state) for own in basis_states), strict=True
    )
    # Always 0, but opaque to XLA: serialises the loops, which bounds peak memory. One for each set
    # of mesh axes: through a shared token all bases would vary over the axes of the first.
    tokens: dict[frozenset[str], jax.Array] = {}
    groups = groups_of(plans, gradients, bases, basis_states)
    for is_resharded, numbers in [(True, x) for x in groups] + [
        (False, x) for x in _kinds(plans, gradients, bases, nodes, {i for x in groups for i in x})
    ]:
        own_plans = tuple(plans[i] for i in numbers)
        place = _Place(
            leaf=jnp.asarray(numbers, jnp.int32),
            start=jnp.stack([jnp.asarray(starts[i], jnp.int32) for i in numbers]),
            offset=jnp.asarray(offsets[list(numbers)], jnp.int32),
        )
        own = [[x[i] for i in numbers] for x in (gradients, bases, nodes)]
        axes = (varying_axes(own[0]) - {*names}) | varying_axes((own[1:], schedule))
        own = vary(own, axes)
        if is_resharded:
            found = _refresh_resharded(settings, own_plans, names, schedule, place, *own)
        else:
            token = tokens.get(axes, vary(jnp.zeros([], jnp.int32), axes))
            *found, tokens[axes] = _refresh_kind(
                settings, own_plans[0].unnamed, names, schedule, place, *own, token
            )
        for i, basis, leaves in zip(numbers, *found, strict=True):
            new_bases[i], new_states[i] = basis, treedefs[i].unflatten(leaves)
    return new_bases, new_states


class _Schedule(NamedTuple):
    """Range of matrices that are due for a refresh at a step, [begin, end), and the step's key."""

    begin: jax.Array
    end: jax.Array
    key: jax.Array


class _Place(NamedTuple):
    """Positions of parameters among all parameters; int32, (parameters,)."""

    leaf: jax.Array  # the number of the parameter
    start: jax.Array  # its first matrix in the current view of per_layer, else 0
    offset: jax.Array  # of its matrices in the schedule


def _kinds(plans, gradients, bases, nodes, done) -> list[list[int]]:
    """Parameters that share a program, without those in ``done``.

    In reverse order, because the backward pass computes the gradients of the last layers first.
    """
    settings = [
        plan.unnamed if is_active(plan) and i not in done else None for i, plan in enumerate(plans)
    ]
    operands = [*zip(gradients, bases, nodes, strict=True)]
    largest = PROGRAM_SHARE * bytes_of(operands)

    def most(own):
        return max(most_in_stack(own[0]), int(largest / max(1, bytes_of(own))))

    return sorted(kinds(settings, operands, most), key=max, reverse=True)


@kernel("settings", "plan", "axis_names", inline=False)
def _refresh_kind(
    settings, plan, axis_names, schedule, place, gradients, bases, basis_states, token
):
    """Loop over the due matrices of parameters of one kind.

    Returns:
      The new bases and basis-dependent states of each parameter, and the token.
    """
    length, layers = len(gradients), plan.layers
    due, stacked = _due(plan, schedule, place, bases), plan.stacked(length)
    if axis_names:  # Else whole matrices without a gradient would be summed at every step.
        due = _without_zeros(plan, due, gradients, axis_names)
    in_stack = most_in_stack(gradients[0])

    def is_left(carry):
        return jnp.any(carry[0])

    def gradient_of(stacks, number):
        if len(stacks) == 1:
            return take_tensor(stacked, stacks[0], number)
        # A branch reads one stack: one stack of all gradients would be a copy of them.
        branches = [
            lambda number, G=G: take_tensor(plan.stacked(in_stack), G, number) for G in stacks
        ]
        return jax.lax.switch(number // (in_stack * layers), branches, number % (in_stack * layers))

    def refresh_next(stacks, carry):
        left, stored, token = carry
        number = jnp.argmax(left).astype(jnp.int32) + token
        tensor = gradient_of(stacks, number)
        if axis_names:
            tensor = jax.lax.pmean(tensor, axis_names)
        matrix = Matrix(tensor, *take_stored(stacked, stored, number))
        leaf, layer = number // layers, number % layers
        own_key = matrix_key(
            settings.method, schedule.key, place.leaf[leaf], place.start[leaf] + layer
        )
        new = refresh_matrix(settings, plan, matrix, own_key, due.is_first[number])
        stored = put_matrix(stacked, stored, new, number)
        return left.at[number].set(False), stored, jnp.minimum(token, number)

    def refresh_all(stored, token):
        carry = (due.is_due, stack(stored), token)
        starts = range(0, length, in_stack)
        stacks = [stack(gradients[start : start + in_stack]) for start in starts]
        next_of = functools.partial(refresh_next, stacks)
        _, new, token = jax.lax.while_loop(is_left, next_of, carry)
        return unstack(new, length), token

    # On CPUs loops without iterations took a third of a step: skip them by a cond.
    stored, token = jax.lax.cond(
        jnp.any(due.is_due) | (token > 0),
        refresh_all,
        lambda *unchanged: unchanged,
        list(zip(bases, basis_states, strict=True)),
        token,
    )
    return *zip(*stored, strict=True), token


def _refresh_resharded(
    settings, plans, axis_names, schedule, place, gradients, bases, basis_states
):
    """Refresh a group of parameters that are sharded over devices."""
    plan = plans[0]
    due = _without_zeros(plan, _due(plan, schedule, place, bases), gradients, axis_names)
    keys = _keys(settings, plan, schedule, place)
    found = refresh_group(settings, plans, axis_names, gradients, bases, basis_states, due, keys)
    return zip(*found, strict=True)


def _due(plan: LeafPlan, schedule: _Schedule, place: _Place, bases: Sequence[Any]) -> Due:
    """Matrices of one kind that are due for a refresh: (parameters · layers,)."""
    nb, modes = len(plan.batch), plan.projected_modes
    # The basis of a mode of length 1 is the same before and after a refresh.
    i = next((i for i, mode in enumerate(modes) if plan.mode_sizes[mode] > 1), 0)
    shape = plan.factor_shape(modes[i])
    columns = [
        jax.lax.slice_in_dim(load(P[i], shape, jnp.float32, nb), 0, 1, axis=-1) for P in bases
    ]
    column = jnp.moveaxis(jnp.concatenate(columns, axis=-1), -1, 0)
    is_first = replicated(is_start(column, nb + 1)).reshape(-1)
    number = (place.offset + place.start)[:, None] + jnp.arange(plan.layers, dtype=jnp.int32)
    is_within = (number >= schedule.begin) & (number < schedule.end)
    return Due(is_within.reshape(-1) | is_first, is_first)


def _without_zeros(
    plan: LeafPlan, due: Due, gradients: Sequence[jax.Array], axis_names: Names
) -> Due:
    """Of the first refreshes those of matrices with a finite, non-zero gradient on any device."""
    started = ~due.is_first.reshape(len(gradients), *plan.batch_shape)
    first = [
        first_gradients(G, x, batch=plan.batch, axis_names=axis_names)
        for G, x in zip(gradients, started, strict=True)
    ]
    first = jnp.concatenate([replicated(x).reshape(-1) for x in first])
    return due._replace(is_due=jnp.where(due.is_first, first, due.is_due))


def _keys(settings, plan, schedule, place):
    """The keys of all matrices of parameters of one kind, (parameters · layers,)."""
    number = place.start[:, None] + jnp.arange(plan.layers, dtype=jnp.int32)
    leaf = jnp.broadcast_to(place.leaf[:, None], number.shape)
    of_matrix = functools.partial(matrix_key, settings.method, schedule.key)
    return jax.vmap(of_matrix)(leaf.reshape(-1), number.reshape(-1))


def matrix_key(
    method: str, step_key: jax.Array, leaf: jax.typing.ArrayLike, number: jax.typing.ArrayLike
) -> jax.Array:
    """Random key of one matrix of a leaf at a step."""
    if method in PROBED:
        return step_key
    return jax.random.fold_in(jax.random.fold_in(step_key, leaf), number)


@kernel("batch", "axis_names")
def first_gradients(
    G: jax.Array, started: jax.Array, *, batch: tuple[int, ...], axis_names: Names = ()
) -> jax.Array:
    """Matrices with their first finite, non-zero gradient.

    Args:
      G: of a parameter.
      started: batch, bool; if all are True, G is not read.
      batch: the axes of independent matrices.
      axis_names: of devices with different gradients; a gradient on any of them counts.

    Returns:
      Batch, bool.
    """
    axes = tuple(a for a in range(G.ndim) if a not in batch)

    def look(G):
        found = place_like(is_usable(G, axes), started) & ~started
        return jax.lax.pmax(found.astype(jnp.int32), axis_names) > 0 if axis_names else found

    return jax.lax.cond(jnp.all(started), lambda _: started & ~started, look, G)
