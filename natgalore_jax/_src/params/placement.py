"""Sharding of low-rank gradients and bases on meshes with explicit axes; elsewhere XLA decides.

A gradient with the spec (l, a, b), of layers, rows and columns, has R = PᵀG with (l, –, b) and
P with (l, a, –). A mesh axis that the projected side frees goes to an axis that is left where it
divides it, so that nothing large is held twice: R (l, –, ba), P (l, ab, –).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec, reshard

from natgalore_jax._src.params.plan import LeafPlan

Names = tuple[str, ...]  # the mesh axes that divide one axis of an array


def has_explicit_sharding(x: jax.Array) -> bool:
    """Whether x lives on a mesh with explicit axes: its sharding is part of its type."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def names_of(x: jax.Array) -> list[Names]:
    """The mesh axes that divide each axis of x."""
    spec = jax.typeof(x).sharding.spec
    names = [() if n is None else n if isinstance(n, tuple) else (n,) for n in spec]
    return names + [()] * (x.ndim - len(names))


def spec_of(names: Iterable[Names]) -> PartitionSpec:
    return PartitionSpec(*(n if len(n) > 1 else n[0] if n else None for n in names))


def explicit_axes_of(x: jax.Array) -> set[str]:
    """The explicit axes of the mesh that x lives on."""
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit}


def placed(x: jax.Array, names: Iterable[Names]) -> jax.Array:
    """x with this sharding; x itself if it has it already."""
    names = list(names)
    return x if names_of(x) == names else reshard(x, spec_of(names))


def replicated(x: jax.Array) -> jax.Array:
    """x whole on every device, for factorisations; itself without explicit axes."""
    return placed(x, [()] * x.ndim) if has_explicit_sharding(x) else x


def place_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """x, of the shape of ``like``, where that is; itself without explicit axes."""
    return placed(x, names_of(like)) if has_explicit_sharding(like) else x


def in_auto_axes(function: Any, like: jax.Array) -> Any:
    """``function``, for whose parts JAX has no rules on explicit axes; its result is as ``like``.

    The compiler then decides how it is divided: what is done along batch axes alone stays so.
    """
    if not has_explicit_sharding(like):
        return function
    return jax.sharding.auto_axes(function, out_sharding=jax.typeof(like).sharding)


def low_rank_names(plan: LeafPlan, like: jax.Array, *, spread: bool) -> list[Names]:
    """Mesh axes over which R (``plan.low_rank_shape``) is sharded, given a parameter ``like``.

    ``spread``: as it is stored, freed mesh axes in use; else as it is multiplied with a basis.
    """
    of = names_of(like)
    names, surviving = [of[a] for a in plan.batch], []
    for mode, rank in zip(plan.modes, plan.ranks, strict=True):
        if rank is None:
            surviving += range(len(names), len(names) + len(mode))
            names += [of[a] for a in mode]
        else:
            names.append(())
    if spread:
        freed = [n for i in plan.projected_modes for a in plan.modes[i] for n in of[a]]
        mesh = jax.typeof(like).sharding.mesh
        names = _with_freed(mesh, names, plan.low_rank_shape, surviving, freed)
    return names


def place_low_rank(plan: LeafPlan, R: jax.Array, like: jax.Array, *, spread: bool) -> jax.Array:
    """R where the parameter ``like`` wants it; itself without explicit axes."""
    if not has_explicit_sharding(like):
        return R
    return placed(R, low_rank_names(plan, like, spread=spread))


def place_factor(
    plan: LeafPlan, mode: int, U: jax.Array, like: jax.Array, *, spread: bool
) -> jax.Array:
    """The basis of one mode (``plan.factor_shape(mode)``, or its codes), as for R."""
    if not has_explicit_sharding(like):
        return U
    of, mesh = names_of(like), jax.typeof(like).sharding.mesh
    own = [*plan.batch, *plan.modes[mode]]
    # Codes of four bits and scales have fewer rows than the basis.
    names = [of[a] if _divides(mesh, of[a], n) else () for a, n in zip(own, U.shape, strict=False)]
    names.append(())
    if spread:
        freed = [n for a in range(len(plan.shape)) if a not in own for n in of[a]]
        names = _with_freed(mesh, names, U.shape, range(len(plan.batch), len(own)), freed)
    return placed(U, names)


def _with_freed(
    mesh: Any,
    names: Sequence[Names],
    shape: Sequence[int],
    axes: Iterable[int],
    freed: Sequence[str],
) -> list[Names]:
    """Each freed mesh axis on the first of these axes of an array that it divides."""
    names, axes = list(names), list(axes)
    for name in freed:
        for axis in axes:
            more = (*names[axis], name)
            if _divides(mesh, more, shape[axis]):
                names[axis] = more
                break
    return names


def _divides(mesh: Any, names: Names, length: int) -> bool:
    return length % math.prod(mesh.shape[n] for n in names) == 0


def zeros_on_axes(x: jax.Array, ndim: int, dtype: Any) -> jax.Array:
    """Zeros of the first axes of x, with their sharding."""
    zeros = jnp.zeros(x.shape[:ndim], dtype)
    return placed(zeros, names_of(x)[:ndim]) if has_explicit_sharding(x) else zeros
