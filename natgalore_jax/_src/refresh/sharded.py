"""Refresh of sharded matrices: each device refreshes whole matrices.

The layers of a stack, or several parameters of one shape, are resharded by layer, as many at a time
as there are devices and only if one of them is due. One all-to-all gathers each matrix and its
state on one device, another all-to-all returns the results. A device never has more than the matrix
that it refreshes. Layers that are whole on different devices already are not communicated.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, reshard

from natgalore_jax._src.kernels.kernel import kernel
from natgalore_jax._src.params.context import is_layer_view
from natgalore_jax._src.params.placement import (
    Names,
    explicit_axes_of,
    has_explicit_sharding,
    names_of,
    spec_of,
)
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.refresh.all_to_all import shard_by_layer, unshard_by_layer
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
from natgalore_jax._src.states.transport import is_basis_state

Found = tuple[StoredFactors, Any]  # bases and basis-dependent states of one parameter


def groups_of(
    plans: Sequence[LeafPlan],
    gradients: Sequence[jax.Array],
    bases: Sequence[StoredFactors],
    basis_states: Sequence[Any],
) -> list[tuple[int, ...]]:
    """Parameters that are resharded together: a stack alone, single matrices by shape.

    Excluded are single matrices of a unique shape, replicated parameters, and layers of a stack in
    :func:`.per_layer`.
    """
    if is_layer_view():
        return []
    groups: list[tuple[int, ...]] = []
    singles: dict[Hashable, list[int]] = defaultdict(list)
    for i, (plan, G) in enumerate(zip(plans, gradients, strict=True)):
        if not has_explicit_sharding(G):
            continue
        devices, of = _devices(plan, G), names_of(G)
        # JAX cannot index a sharded axis, not even if its mesh axis has size one.
        if any(of[a] for a in plan.batch) or (devices > 1 and plan.layers > 1):
            groups.append((i,))
        elif devices > 1:
            stored = jax.tree.leaves(basis_states[i], is_leaf=is_basis_state)
            arrays, treedef = jax.tree.flatten((bases[i], stored))
            kind = (plan.unnamed, jax.typeof(G))
            singles[kind, treedef, *map(jax.typeof, arrays)].append(i)
    for alike in singles.values():
        devices = _devices(plans[alike[0]], gradients[alike[0]])
        chunks = [alike[i : i + devices] for i in range(0, len(alike), devices)]
        groups += [tuple(chunk) for chunk in chunks if len(chunk) > 1]
    return groups


def _names(plan: LeafPlan, G: jax.Array) -> Names:
    """Mesh axes over which G is sharded, mesh axes of its layers first."""
    of = names_of(G)
    return tuple(name for a in (*plan.batch, *plan.matrix_axes) for name in of[a])


def _devices(plan: LeafPlan, G: jax.Array) -> int:
    """Number of devices over which G is sharded."""
    mesh = jax.typeof(G).sharding.mesh
    return math.prod(mesh.shape[name] for name in _names(plan, G))


@kernel("settings", "plans", "axis_names")
def refresh_group(
    settings: RefreshSettings,
    plans: tuple[LeafPlan, ...],
    axis_names: Names,
    gradients: Sequence[jax.Array],
    bases: Sequence[StoredFactors],
    basis_states: Sequence[Any],
    due: Due,
    matrix_keys: jax.Array,
) -> list[Found]:
    """Refresh the matrices of a group of :func:`groups_of` that are due.

    Args:
      settings: of the refresh.
      plans, gradients, bases, basis_states: as in ``refresh.refresh``, for the group.
      axis_names: of devices with different gradients, whose mean is used.
      due: which matrices are due, (parameters · layers,).
      matrix_keys: of all matrices in the same order, for the random methods and the probes.

    Returns:
      The new bases and basis-dependent states of each parameter, sharded as before.
    """

    def reshard_and_refresh(stored):
        group = [(G, *own) for G, own in zip(gradients, stored, strict=True)]
        return _refresh_by_layer(settings, plans, axis_names, group, due, matrix_keys)

    stored = list(zip(bases, basis_states, strict=True))
    return jax.lax.cond(jnp.any(due.is_due), reshard_and_refresh, lambda stored: stored, stored)


class _Todo(NamedTuple):
    """Refresh flags and random keys, (layers, matrices of a layer)."""

    is_due: jax.Array
    is_first: jax.Array
    key: jax.Array


class _Layout(NamedTuple):
    """Layout of a group, as one stack of layers, over devices.

    The arrays of a group are its gradients, bases and states.
    """

    layer_plan: LeafPlan  # of a stack of one layer
    names: Names  # mesh axes over which G is sharded, those of its layers first
    axes: list[int]  # the layer axis of each array
    of: list[list[Names]]  # the mesh axes of each axis of each array
    length: int  # layers in the shards of a device
    at_once: int  # layers that are resharded at once, one for each device
    treedef: Any  # of bases and states

    @property
    def of_layers(self) -> Names:
        return self.of[0][self.axes[0]]


def _layout_of(plans: Sequence[LeafPlan], group: Sequence[Any]) -> _Layout:
    is_stack = len(plans) == 1
    plan = plans[0] if is_stack else plans[0].stacked(len(plans))
    layer_axis = plan.batch[0]
    G, *stored = jax.tree.leaves(group[0])
    of = [[*([] if is_stack else [()]), *names_of(x)] for x in (G, *stored)]
    of_layers = of[0][layer_axis]
    for own in of[1:]:
        if own[0] != of_layers:
            paths = ", ".join(str(p.path) for p in plans)
            raise ValueError(
                f"{paths}: the layers of its state must be sharded over {of_layers}, as the "
                f"parameter, got {own[0]}: use natgalore_jax.training.state_shardings"
            )
    names, sizes = _names(plans[0], G), jax.typeof(G).sharding.mesh.shape
    shape = tuple(1 if a == layer_axis else n for a, n in enumerate(plan.shape))
    return _Layout(
        layer_plan=dataclasses.replace(plan, shape=shape),
        names=names,
        axes=[layer_axis] + [0] * len(stored),
        of=of,
        length=plan.shape[layer_axis] // math.prod(sizes[name] for name in of_layers),
        at_once=math.prod(sizes[name] for name in names[len(of_layers) :]),
        treedef=jax.tree.structure(tuple(group[0][1:])),
    )


def _refresh_by_layer(settings, plans, axis_names, group, due, matrix_keys):
    """Reshard by layer, refresh the matrices that are due, and reshard back."""
    layout, is_stack = _layout_of(plans, group), len(plans) == 1
    by_layer = (-1, layout.layer_plan.layers)
    todo = _Todo(*(x.reshape(by_layer) for x in (due.is_due, due.is_first, matrix_keys)))

    def on_each_device(group, layers, todo):
        arrays = [*zip(*map(jax.tree.leaves, group), strict=True)]
        arrays = [xs[0] if is_stack else jnp.stack(xs) for xs in arrays]
        refresh_layer = functools.partial(_refresh_layer, settings, layout.layer_plan, todo)
        stored = _refresh_shards(layout, axis_names, refresh_layer, todo, layers[0], arrays)
        each = [stored] if is_stack else [[x[i] for x in stored] for i in range(len(plans))]
        return [layout.treedef.unflatten(own) for own in each]

    specs = [jax.tree.map(lambda x: spec_of(names_of(x)), own) for own in group]
    of_layers = PartitionSpec(layout.of_layers or None)
    # Not by axis_index, which jax 0.10.0 cannot lower within another shard_map.
    layers = reshard(jnp.arange(len(todo.is_due), dtype=jnp.int32), of_layers)
    return jax.shard_map(
        on_each_device,
        in_specs=(specs, of_layers, PartitionSpec()),
        out_specs=[tuple(spec[1:]) for spec in specs],
        axis_names=explicit_axes_of(group[0][0]),
    )(group, layers, todo)


def _refresh_shards(layout, axis_names, refresh_layer, todo, first, arrays):
    """Refresh the layers of a device's shards, as many at a time as there are devices.

    Args:
      refresh_layer: see :func:`_refresh_layer`.
      first: the number of the first layer of the shards.
      arrays: shards of G, bases and states.

    Returns:
      The new shards of bases and states.
    """
    length, at_once = layout.length, layout.at_once
    padding = max(at_once - length, 0)
    G, *stored = [
        jnp.pad(x, [(0, padding if a == axis else 0) for a in range(x.ndim)]) if padding else x
        for x, axis in zip(arrays, layout.axes, strict=True)
    ]

    def refresh_some(i, stored):
        # The last slice may overlap its predecessor.
        start = jnp.minimum(i * at_once, length + padding - at_once)
        here = start + jnp.arange(at_once, dtype=jnp.int32)
        is_next = (here >= i * at_once) & (here < length)
        numbers = jnp.where(is_next, first + here, -1)
        return jax.lax.cond(
            jnp.any(is_next & jnp.any(todo.is_due[first + here], -1)),
            lambda stored: _refresh_slice(
                layout, axis_names, refresh_layer, numbers, start, G, stored
            ),
            lambda stored: stored,
            stored,
        )

    stored = jax.lax.fori_loop(0, math.ceil(length / at_once), refresh_some, stored)
    return [x[:length] for x in stored]


def _refresh_slice(layout, axis_names, refresh_layer, numbers, start, G, stored):
    """Refresh a layer on each device: those from ``start``, or none where a number is -1."""
    names = layout.names
    moved = []
    for x, axis, of in zip([G, *stored], layout.axes, layout.of, strict=True):
        some = jax.lax.dynamic_slice_in_dim(x, start, layout.at_once, axis)
        moved.append(shard_by_layer(some, axis, of, names))
    G, *own = moved
    if axis_names:
        # Here and not per matrix: all devices of a collective must take one branch.
        G = jax.lax.pmean(G, axis_names)
    number = shard_by_layer(numbers, 0, [layout.of_layers], names)[0]
    new = jax.tree.leaves(refresh_layer(number, G, layout.treedef.unflatten(own)))
    back = [unshard_by_layer(x, 0, of, names) for x, of in zip(new, layout.of[1:], strict=True)]
    return [
        jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
        for x, y in zip(stored, back, strict=True)
    ]


def _refresh_layer(settings, plan, todo, number, G, stored):
    """Refresh the matrices of one layer that are due; number -1 is no layer."""

    def refresh_due(i, stored):
        def renew(stored):
            matrix = Matrix(take_tensor(plan, G, i), *take_stored(plan, stored, i))
            of_matrix = (todo.key[number, i], todo.is_first[number, i])
            return put_matrix(plan, stored, refresh_matrix(settings, plan, matrix, *of_matrix), i)

        is_own = (number >= 0) & todo.is_due[number, i]
        return jax.lax.cond(is_own, renew, lambda stored: stored, stored)

    return jax.lax.fori_loop(0, plan.layers, refresh_due, stored)
