"""Refresh of sharded matrices: each device refreshes whole matrices.

The layers of a stack, or several parameters of one shape, are resharded by layer, as many at a time
as there are devices and only if one of them is due. One all-to-all gathers each matrix and its
state on one device, another all-to-all returns the results. A device never has more than the matrix
that it refreshes. Layers that are whole on different devices already are not communicated.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

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
        groups = [(G, *own) for G, own in zip(gradients, stored, strict=True)]
        return _refresh_by_layer(settings, plans, axis_names, groups, due, matrix_keys)

    stored = list(zip(bases, basis_states, strict=True))
    return jax.lax.cond(jnp.any(due.is_due), reshard_and_refresh, lambda stored: stored, stored)


def _refresh_by_layer(settings, plans, axis_names, groups, due, matrix_keys):
    """Reshard by layer, refresh the matrices that are due, and reshard back."""
    is_stack = len(plans) == 1
    plan = plans[0] if is_stack else plans[0].stacked(len(plans))
    G = groups[0][0]
    names = _names(plans[0], G)
    layer_axis, *other_batch = plan.batch
    mesh = jax.typeof(G).sharding.mesh
    arrays, treedef = jax.tree.flatten(groups[0])
    axes = [layer_axis] + [0] * (len(arrays) - 1)  # of G, bases and state
    layouts = [[*([] if is_stack else [()]), *names_of(x)] for x in arrays]
    of_layers = layouts[0][layer_axis]
    for of in layouts[1:]:
        if of[0] != of_layers:
            paths = ", ".join(str(p.path) for p in plans)
            raise ValueError(
                f"{paths}: the layers of its state must be sharded over {of_layers}, as the "
                f"parameter, got {of[0]}: use natgalore_jax.training.state_shardings"
            )

    length = plan.shape[layer_axis] // math.prod(mesh.shape[n] for n in of_layers)
    devices = math.prod(mesh.shape[n] for n in names[len(of_layers) :])
    padding = max(devices - length, 0)
    shape = tuple(1 if a == layer_axis else n for a, n in enumerate(plan.shape))
    own_plan = dataclasses.replace(plan, shape=shape)
    matrices = math.prod(plan.shape[a] for a in other_batch)  # per layer
    is_due_layer = due.is_due.reshape(-1, matrices)

    def on_each_device(groups, layers, is_due, matrix_keys, is_first):
        parts = [*zip(*map(jax.tree.leaves, groups), strict=True)]
        parts = [xs[0] if is_stack else jnp.stack(xs) for xs in parts]
        G, *stored = [_padded(x, axis, padding) for x, axis in zip(parts, axes, strict=True)]
        first = layers[0]

        def refresh_some(i, stored):
            """As many layers as there are devices; the last slice may overlap its predecessor."""
            start = jnp.minimum(i * devices, length + padding - devices)
            here = start + jnp.arange(devices, dtype=jnp.int32)
            is_next = (here >= i * devices) & (here < length)
            is_wanted = is_next & jnp.any(is_due[first + here], -1)

            def move_and_refresh(stored):
                some = [
                    jax.lax.dynamic_slice_in_dim(x, start, devices, axis)
                    for x, axis in zip([G, *stored], axes, strict=True)
                ]
                own = [
                    shard_by_layer(x, axis, of, names)
                    for x, axis, of in zip(some, axes, layouts, strict=True)
                ]
                if axis_names:
                    # Here and not per matrix: all devices of a collective must take one branch.
                    own[0] = jax.lax.pmean(own[0], axis_names)
                numbers = jnp.where(is_next, first + here, -1)
                layer = shard_by_layer(numbers, 0, [of_layers], names)[0]
                own = refresh_own(treedef.unflatten(own), layer)
                back = [
                    unshard_by_layer(x, 0, of, names)
                    for x, of in zip(own, layouts[1:], strict=True)
                ]
                return [
                    jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
                    for x, y in zip(stored, back, strict=True)
                ]

            return jax.lax.cond(jnp.any(is_wanted), move_and_refresh, lambda stored: stored, stored)

        def refresh_own(group, layer):
            """Refresh the layer of this device."""

            def refresh_due(i, stored):
                number = layer * matrices + i

                def renew(stored):
                    matrix = Matrix(take_tensor(own_plan, G, i), *take_stored(own_plan, stored, i))
                    new = refresh_matrix(
                        settings, own_plan, matrix, matrix_keys[number], is_first[number]
                    )
                    return put_matrix(own_plan, stored, new, i)

                is_own = (layer >= 0) & is_due[layer, i]
                return jax.lax.cond(is_own, renew, lambda stored: stored, stored)

            G, *stored = group
            return jax.tree.leaves(jax.lax.fori_loop(0, matrices, refresh_due, tuple(stored)))

        stored = jax.lax.fori_loop(0, math.ceil(length / devices), refresh_some, stored)
        stored = [x[:length] for x in stored]
        structure = jax.tree.structure(tuple(groups[0][1:]))
        if is_stack:
            return [structure.unflatten(stored)]
        return [structure.unflatten([x[i] for x in stored]) for i in range(len(plans))]

    specs = [jax.tree.map(lambda x: spec_of(names_of(x)), group) for group in groups]
    replicated, by_layer = PartitionSpec(), PartitionSpec(of_layers or None)
    # Not by axis_index, which jax 0.10.0 cannot lower within another shard_map.
    layers = reshard(jnp.arange(plan.shape[layer_axis], dtype=jnp.int32), by_layer)
    return jax.shard_map(
        on_each_device,
        in_specs=(specs, by_layer, replicated, replicated, replicated),
        out_specs=[tuple(spec[1:]) for spec in specs],
        axis_names=explicit_axes_of(G),
    )(list(groups), layers, is_due_layer, matrix_keys, due.is_first)


def _padded(x: jax.Array, axis: int, padding: int) -> jax.Array:
    return jnp.pad(x, [(0, padding if a == axis else 0) for a in range(x.ndim)]) if padding else x
