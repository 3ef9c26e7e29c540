"""Projection into the subspace and back, for any modes, batch axes and shardings.

Nothing is flattened: merging a sharded axis with another axis would gather it.
"""

import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from natgalore_jax._src.kernels.kernel import kernel
from natgalore_jax._src.params.placement import (
    explicit_axes_of,
    has_explicit_sharding,
    low_rank_names,
    names_of,
    place_factor,
    placed,
    spec_of,
)
from natgalore_jax._src.params.plan import LeafPlan

# Bases of one parameter, one for each projected mode.
Factors = tuple[jax.Array, ...]


def contract(subscripts: str, *operands: jax.Array, dtype=None, precision=None) -> jax.Array:
    """``einsum`` accumulated in float32 at least, also for sharded operands.

    On a mesh with explicit axes a contraction over a sharded axis needs ``out_sharding``: every
    remaining axis keeps its sharding.
    """
    dtype = dtype or jnp.result_type(*operands)
    accumulator = jnp.promote_types(dtype, jnp.float32)

    def einsum(*operands):
        return jnp.einsum(
            subscripts,
            *operands,
            precision=precision,
            preferred_element_type=accumulator,
            out_sharding=_surviving_sharding(subscripts, operands),
        )

    if all(x.dtype == accumulator for x in operands):
        return einsum(*operands).astype(dtype)
    # XLA on CPUs has no kernel for some products of bfloat16 into float32: convert the operands.
    out = jax.lax.platform_dependent(
        *operands,
        cpu=lambda *xs: einsum(*(x.astype(accumulator) for x in xs)),
        default=einsum,
    )
    return out.astype(dtype)


def rounding_error(dtype: Any) -> float:
    """Relative mean square of the rounding error of numbers in a dtype; 0 for float32."""
    eps = float(jnp.finfo(dtype).eps)
    return eps**2 / 12 if eps > jnp.finfo(jnp.float32).eps else 0.0


def _surviving_sharding(subscripts: str, operands: Sequence[jax.Array]) -> NamedSharding | None:
    explicit = [x for x in operands if has_explicit_sharding(x)]
    if not explicit:
        return None
    mesh = jax.typeof(explicit[0]).sharding.mesh
    inputs, output = subscripts.split("->")
    axis_of = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        for letter, axis in zip(letters, jax.typeof(operand).sharding.spec, strict=False):
            if axis is not None and letter in output and axis not in axis_of.values():
                axis_of.setdefault(letter, axis)
    return NamedSharding(mesh, PartitionSpec(*(axis_of.get(letter) for letter in output)))


def project(
    plan: LeafPlan, G: jax.Array, factors: Sequence[jax.Array], dtype: Any = None
) -> jax.Array:
    """``R = G ×₁ U⁽¹⁾ᵀ … ×_d U⁽ᵈ⁾ᵀ`` over the projected modes: ``PᵀG``, ``GQ`` or ``PᵀGQ``.

    Args:
      plan: how this parameter is projected.
      G: shape of the parameter.
      factors: one basis per projected mode, in the order of the modes.
      dtype: of the result; None is the dtype of G.

    Returns:
      Shape ``plan.low_rank_shape``.
    """
    index, dtype = Letters(plan), dtype or jnp.result_type(G)
    letters, low_modes = index.full, ()
    for mode, U in zip(plan.projected_modes, factors, strict=True):
        low_modes = (*low_modes, mode)
        out = index.arranged(low_modes)
        G = contract(f"{letters},{index.factor(mode)}->{out}", G, U, dtype=dtype)
        letters = out
    return G


@kernel("plan")
def project_to_stored(plan: LeafPlan, G: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    """:func:`project`, sharded as moments are stored.

    Over a sharded projected axis R is a sum over devices: a reduce-scatter in float32, so that each
    device receives only its stored shard.
    """
    if not has_explicit_sharding(G):
        return project(plan, G, factors)
    local = low_rank_names(plan, G, stored=False)
    stored = low_rank_names(plan, G, stored=True)
    summed = [n for i in plan.projected_modes for a in plan.modes[i] for n in names_of(G)[a]]
    if local == stored or len(plan.projected_modes) > 1:
        return placed(project(plan, G, factors), stored)

    def on_each_device(G, factors):
        R = project(plan, G, factors, jnp.promote_types(G.dtype, jnp.float32))
        for name in summed:
            at = next((a for a, names in enumerate(stored) if name in names), None)
            if at is None:
                R = jax.lax.psum(R, name)
            else:
                R = jax.lax.psum_scatter(R, name, scatter_dimension=at, tiled=True)
        return R.astype(G.dtype)

    factors = [
        place_factor(plan, mode, U, G, stored=False)
        for mode, U in zip(plan.projected_modes, factors, strict=True)
    ]
    specs = [spec_of(names_of(U)) for U in factors]
    return jax.shard_map(
        on_each_device,
        in_specs=(spec_of(names_of(G)), specs),
        out_specs=spec_of(stored),
        axis_names=explicit_axes_of(G),
    )(G, factors)


def project_back(plan: LeafPlan, R: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
    """``R ×₁ U⁽¹⁾ … ×_d U⁽ᵈ⁾``, the transpose of :func:`project`: ``PR``, ``RQᵀ`` or ``PRQᵀ``.

    Args:
      plan: how this parameter is projected.
      R: shape ``plan.low_rank_shape``.
      factors: one basis per projected mode, in the order of the modes.

    Returns:
      Shape of the parameter, dtype of R.
    """
    index = Letters(plan)
    low_modes = plan.projected_modes
    letters = index.arranged(low_modes)
    for mode, U in reversed(list(zip(plan.projected_modes, factors, strict=True))):
        low_modes = low_modes[:-1]
        out = index.arranged(low_modes) if low_modes else index.full
        R = contract(f"{letters},{index.factor(mode)}->{out}", R, U, dtype=R.dtype)
        letters = out
    return R


class Letters:
    """Index letters of a plan for :func:`contract`: one per axis, an upper-case one per rank."""

    def __init__(self, plan: LeafPlan):
        self.full = string.ascii_lowercase[: len(plan.shape)]
        self.batch = "".join(self.full[a] for a in plan.batch)
        self.modes = ["".join(self.full[a] for a in mode) for mode in plan.modes]
        self.ranks = string.ascii_uppercase[: len(plan.modes)]

    def factor(self, mode: int) -> str:
        """The basis of one mode."""
        return self.batch + self.modes[mode] + self.ranks[mode]

    def arranged(self, low_modes: Sequence[int]) -> str:
        """Batch axes, then the modes in order, with one rank axis for each of ``low_modes``."""
        return self.batch + "".join(
            self.ranks[i] if i in low_modes else axes for i, axes in enumerate(self.modes)
        )
