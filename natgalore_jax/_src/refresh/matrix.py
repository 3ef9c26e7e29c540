"""Refresh of one matrix: new bases, and transport of its basis-dependent state."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.basis import PROBED, is_usable, new_basis
from natgalore_jax._src.kernels.linear_codes import (
    LinearCodes,
    Stored,
    bits_of,
    load,
    relative_error,
    store,
)
from natgalore_jax._src.kernels.projection import rounding_error
from natgalore_jax._src.kernels.rotation import change_of_basis
from natgalore_jax._src.params.placement import (
    has_explicit_sharding,
    names_of,
    place_like,
    placed,
    replicated,
    spec_of,
)
from natgalore_jax._src.params.plan import LeafPlan


@dataclasses.dataclass(frozen=True)
class RefreshSettings:
    """The arguments of ``low_rank_project`` for the schedule and method of refreshes."""

    update_interval: int
    method: str
    transition: str
    stagger: bool
    seed: int


class Due(NamedTuple):
    """Refresh flags of the matrices of parameters of one kind: bool, (parameters · layers,)."""

    is_due: jax.Array
    is_first: jax.Array  # whether the basis is only a start


StoredFactors = tuple[Stored, ...]


def _index_of(plan: LeafPlan, layer: jax.Array) -> tuple[jax.Array, ...]:
    """``jnp.unravel_index``, in the dtype of the layer."""
    index: list[jax.Array] = []
    for size in reversed(plan.batch_shape):
        index.insert(0, layer % size)
        layer = layer // size
    return tuple(index)


class Matrix(NamedTuple):
    """One matrix of a parameter, without batch axes: gradient, bases and basis-dependent state."""

    tensor: jax.Array  # axes in the order of the modes
    basis: StoredFactors
    basis_states: list[Any]


def take_tensor(plan: LeafPlan, G: jax.Array, layer: jax.Array) -> jax.Array:
    """Matrix number ``layer`` of a gradient, axes in the order of the modes."""
    order = [plan.matrix_axes.index(a) for mode in plan.modes for a in mode]
    return _take(G, plan.batch, _index_of(plan, layer)).transpose(order)


def take_stored(plan: LeafPlan, stored: Any, layer: jax.Array) -> Any:
    """Entries of matrix number ``layer`` of arrays with leading batch axes."""
    index = _index_of(plan, layer)
    return jax.tree.map(lambda x: _take(x, range(len(index)), index), stored)


def put_matrix(
    plan: LeafPlan, stored: tuple[StoredFactors, Any], new: tuple[StoredFactors, Any], layer: Any
) -> tuple[StoredFactors, Any]:
    """Replace bases and basis-dependent state of one matrix of a parameter."""
    index = _index_of(plan, layer)
    return jax.tree.map(lambda x, y: _put(x, y, index), stored, new)


def refresh_matrix(
    settings: RefreshSettings,
    plan: LeafPlan,
    matrix: Matrix,
    key: jax.Array,
    is_first: jax.Array,
) -> tuple[StoredFactors, Any]:
    """Refresh the bases of one matrix and transport its basis-dependent state.

    Args:
      settings: of the refresh.
      plan: of the parameter.
      matrix: gradient, old bases and state.
      key: for the random methods and the probes.
      is_first: scalar boolean, whether the basis is only a start.

    Returns:
      Bases and basis-dependent state as stored; unchanged for a zero or non-finite gradient.
    """
    tensor, basis, basis_states = matrix
    return jax.lax.cond(
        is_usable(tensor),
        lambda basis, states: _refreshed(settings, plan, tensor, basis, states, key, is_first),
        lambda *stored: stored,
        basis,
        basis_states,
    )


def _refreshed(settings, plan, tensor, basis, basis_states, key, is_first):
    new_factors, C_of_axis = [], {}
    for number, (mode, U) in enumerate(zip(plan.projected_modes, basis, strict=True)):
        shape = (*plan.mode_shape(mode), plan.rank_of(mode))
        P = replicated(load(U, shape, jnp.float32)).reshape(plan.mode_sizes[mode], -1)
        P = P.astype(jnp.promote_types(P.dtype, jnp.float32))
        P_new = new_basis(
            settings.method,
            _unfold(plan, tensor, mode),
            P,
            key if settings.method in PROBED else jax.random.fold_in(key, number),
            is_first,
            is_right=len(plan.modes) == 2 and mode == 1,
        )
        if settings.transition != "keep":
            # From the new basis before rounding: rounding errors differ at every refresh, and if
            # moments followed them, the errors would add up.
            C = change_of_basis(P_new, P, _rounding_of(U))
            C_of_axis[plan.low_rank_axes[mode]] = C
        U_new = store(P_new.reshape(shape), U)
        new_factors.append(jax.tree.map(place_like, U_new, U))
    if settings.transition != "keep":
        basis_states = [c.moved(settings.transition, C_of_axis) for c in basis_states]
    return tuple(new_factors), basis_states


def _rounding_of(stored: Stored) -> float:
    """Relative mean square of the rounding error of a stored basis; 0 for float32."""
    if isinstance(stored, LinearCodes):
        return relative_error(bits_of(stored))
    return rounding_error(stored.dtype)


def _unfold(plan: LeafPlan, tensor: jax.Array, mode: int) -> jax.Array:
    """Matricisation of the tensor with one mode as rows.

    On explicit meshes it is sharded by columns alone, so that ``G Gᵀ`` is a sum over devices. A
    reshape keeps the sharding of the first of the axes that it merges: one that the mesh axes
    divide goes there, since no basis depends on the order of columns. Without one it is replicated.
    """
    start = sum(len(axes) for axes in plan.modes[:mode])
    rows = range(start, start + len(plan.modes[mode]))
    columns = [a for a in range(tensor.ndim) if a not in rows]
    shape = (plan.mode_sizes[mode], -1)
    if not has_explicit_sharding(tensor):
        return tensor.transpose([*rows, *columns]).reshape(shape)
    of, mesh = names_of(tensor), jax.typeof(tensor).sharding.mesh
    names = tuple(name for a in (*columns, *rows) for name in of[a])
    devices = math.prod(mesh.shape[name] for name in names)
    columns.sort(key=lambda a: tensor.shape[a] % devices != 0)
    if tensor.shape[columns[0]] % devices:
        names = ()
    tensor = tensor.transpose([*rows, *columns])
    tensor = placed(tensor, [*[()] * len(rows), names, *[()] * (len(columns) - 1)])
    return tensor.reshape(shape, out_sharding=spec_of([(), names]))


def _take(array: jax.Array, axes: Sequence[int], index: tuple) -> jax.Array:
    for axis, i in sorted(zip(axes, index, strict=True), reverse=True, key=lambda x: x[0]):
        array = jax.lax.dynamic_index_in_dim(array, i, axis, keepdims=False)
    return array


def _put(array: jax.Array, value: jax.Array, index: tuple) -> jax.Array:
    if not index:
        return value
    starts = (*index, *([jnp.zeros_like(index[0])] * value.ndim))
    value = value.reshape((1,) * len(index) + value.shape).astype(array.dtype)
    return jax.lax.dynamic_update_slice(array, value, starts)
