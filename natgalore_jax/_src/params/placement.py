"""Sharding of low-rank gradients and bases on meshes with explicit axes; elsewhere XLA decides.

For a gradient with the spec (l, a, b) of layers, rows and columns, R = PᵀG has (l, –, b) and P has
(l, a, –). Replication over the freed mesh axis would waste memory. For storage that mesh axis goes
to another axis whose length it divides: R (l, –, ba), P (l, ab, –).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from natgalore_jax._src.params.plan import LeafPlan

Names = tuple[str, ...]  # mesh axes over which one axis of an array is sharded
AxisName = str | tuple[str, ...]  # mesh axes of a collective


def has_explicit_sharding(x: jax.Array) -> bool:
    """Whether x is on a mesh with explicit axes, where its sharding is part of its type."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def is_manual() -> bool:
    """Whether arrays are the shards of devices, within ``jax.shard_map``."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def names_of(x: jax.Array) -> list[Names]:
    """Mesh axes over which each axis of x is sharded."""
    spec = jax.typeof(x).sharding.spec
    names = [() if n is None else n if isinstance(n, tuple) else (n,) for n in spec]
    return names + [()] * (x.ndim - len(names))


def spec_of(names: Iterable[Names]) -> PartitionSpec:
    return PartitionSpec(*(n if len(n) > 1 else n[0] if n else None for n in names))


def explicit_axes_of(x: jax.Array) -> set[str]:
    """Explicit axes of the mesh of x."""
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit}


def placed(x: jax.Array, names: Iterable[Names]) -> jax.Array:
    """Reshard x if its sharding differs."""
    names = list(names)
    return x if names_of(x) == names else reshard(x, spec_of(names))


def replicated(x: jax.Array) -> jax.Array:
    """Replicate x for factorisations; no-op without explicit axes."""
    return placed(x, [()] * x.ndim) if has_explicit_sharding(x) else x


def place_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Shard x as ``like``, which has the same shape; no-op without explicit axes."""
    return placed(x, names_of(like)) if has_explicit_sharding(like) else x


def in_auto_axes(function: Any, like: jax.Array) -> Any:
    """``function`` on automatic axes, for operations without rules for explicit axes.

    The result is sharded as ``like``. XLA keeps operations along batch axes sharded.
    """
    if not has_explicit_sharding(like):
        return function
    return _auto_axes(function, like, jax.typeof(like).sharding)


def with_auto_axes(function: Any, x: jax.Array, axis: int, shape: Sequence[int]) -> jax.Array:
    """``function(x)``, of the given shape, where ``axis`` of x or of the result may be sharded.

    On explicit meshes JAX cannot reshape a sharded axis into blocks larger than a shard. XLA can on
    automatic axes, where it communicates one number per block.
    """
    if not has_explicit_sharding(x):
        return function(x)
    mesh, names = jax.typeof(x).sharding.mesh, names_of(x)
    if not _divides(mesh, names[axis], shape[axis]):
        names[axis] = ()
    out = NamedSharding(mesh, spec_of(names))
    return _auto_axes(function, x, out)(x)


def _auto_axes(function: Any, x: jax.Array, out: Any) -> Any:
    """``function`` with the explicit axes of the mesh of x made automatic, and no manual one."""
    axes = tuple(sorted(explicit_axes_of(x)))
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=out)


def varying_axes(tree: Any) -> frozenset[str]:
    """Mesh axes over which some array of ``tree`` varies, within ``jax.shard_map``."""
    kinds = (jax.typeof(x).manual_axis_type for x in jax.tree.leaves(tree))
    return frozenset(name for kind in kinds for name in kind.varying)


def vary(tree: Any, axes: Iterable[str]) -> Any:
    """``tree`` with arrays that vary over these mesh axes by their types.

    Within ``jax.shard_map`` both branches of a ``cond``, and a loop's carry before and after an
    iteration, must vary over the same mesh axes; arithmetic converts by itself.
    """

    def varying(x):
        missing = sorted(set(axes) - varying_axes(x))
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(varying, tree)


def low_rank_names(plan: LeafPlan, like: jax.Array, *, stored: bool) -> list[Names]:
    """Mesh axes over which R (``plan.low_rank_shape``) is sharded, given a parameter ``like``.

    ``stored``: the layout in the state, which uses freed mesh axes; else the layout of products.
    """
    of = names_of(like)
    names, surviving = [of[a] for a in plan.batch], []
    for mode, rank in zip(plan.modes, plan.ranks, strict=True):
        if rank is None:
            surviving += range(len(names), len(names) + len(mode))
            names += [of[a] for a in mode]
        else:
            names.append(())
    if stored:
        freed = [n for i in plan.projected_modes for a in plan.modes[i] for n in of[a]]
        mesh = jax.typeof(like).sharding.mesh
        names = _with_freed(mesh, names, plan.low_rank_shape, surviving, freed)
    return names


def place_low_rank(plan: LeafPlan, R: jax.Array, like: jax.Array) -> jax.Array:
    """Shard R for products with the parameter ``like``; no-op without explicit axes."""
    if not has_explicit_sharding(like):
        return R
    return placed(R, low_rank_names(plan, like, stored=False))


def place_factor(
    plan: LeafPlan, mode: int, U: jax.Array, like: jax.Array, *, stored: bool
) -> jax.Array:
    """Shard the basis of one mode (``plan.factor_shape(mode)``, or its codes), as for R."""
    if not has_explicit_sharding(like):
        return U
    of, mesh = names_of(like), jax.typeof(like).sharding.mesh
    own = [*plan.batch, *plan.modes[mode]]
    names = [*(of[a] for a in own), ()]
    if stored:
        freed = [n for a in range(len(plan.shape)) if a not in own for n in of[a]]
        shape = plan.factor_shape(mode)
        names = _with_freed(mesh, names, shape, range(len(plan.batch), len(own)), freed)
    # 4-bit codes and block scales, which decode together, have fewer rows than the basis.
    divided = zip(names, U.shape, strict=True)
    return placed(U, [axes if _divides(mesh, axes, n) else () for axes, n in divided])


def _with_freed(
    mesh: Any,
    names: Sequence[Names],
    shape: Sequence[int],
    axes: Iterable[int],
    freed: Sequence[str],
) -> list[Names]:
    """Assign each freed mesh axis to the first of ``axes`` whose length it divides."""
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
    """Zeros with the first axes of x, their sharding, and the mesh axes over which x varies."""
    zeros = vary(jnp.zeros(x.shape[:ndim], dtype), varying_axes(x))
    return placed(zeros, names_of(x)[:ndim]) if has_explicit_sharding(x) else zeros
