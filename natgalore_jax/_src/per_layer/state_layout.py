"""Owners and layer axes of the leaves of an optimizer's state."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax

from natgalore_jax._src.params.plan import LeafPlan, record_plans
from natgalore_jax._src.params.where import KeyPath
from natgalore_jax._src.per_layer.layer_parts import Parts, with_length
from natgalore_jax._src.states.entries import owners_of


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Owners and layer axes of the leaves of an optimizer's state; one entry per leaf."""

    treedef: Any
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    paths: tuple[str, ...]
    owners: tuple[int | None, ...]  # number of the parameter, None for shared leaves
    layer_axes: tuple[int | None, ...]  # layer axis, for a stacked owner

    def of(self, parameters: Sequence[int]) -> list[int]:
        """The leaves that belong to these parameters."""
        return [k for k, owner in enumerate(self.owners) if owner in parameters]

    @property
    def of_one_layer(self) -> list[jax.ShapeDtypeStruct]:
        return [
            with_length(x, axis, 1) for x, axis in zip(self.shapes, self.layer_axes, strict=True)
        ]

    @property
    def shared(self) -> list[int]:
        return [k for k, owner in enumerate(self.owners) if owner is None]


def state_layout(tx: optax.GradientTransformation, parts: Parts) -> StateLayout:
    """Layout of ``tx.init``, from a comparison of states of models of different depth.

    Raises:
      ValueError: if the state cannot be split by layer.
    """
    state, plans = _init(tx, parts, parts.length)
    _check_plans(parts, plans, _init(tx, parts, 1)[1])
    entries, treedef = jax.tree_util.tree_flatten_with_path(state)
    # One layer more or less: a stack of vectors may reach the size of moments in 8 bits between.
    depths = [n for n in (parts.length + 1, parts.length - 1) if n]
    others = (_init(tx, parts, n)[0] for n in depths)
    other = next((x for x in others if jax.tree.structure(x) == treedef), None)
    if other is None:
        raise ValueError(
            f"the optimizer's state has another structure for {parts.length} layers than for "
            f"{' or '.join(map(str, depths))}, so that it cannot be split by layer"
        )
    paths = tuple(str(KeyPath(path)) for path, _ in entries)
    owners, axes = [], []
    for path, here, there, owner in zip(
        paths,
        jax.tree.leaves(state),
        jax.tree.leaves(other),
        owners_of(tx, state, parts.treedef),
        strict=True,
    ):
        axis = _layer_axis(path, here.shape, there.shape, parts.length)
        is_stacked = owner in parts.stacked
        if axis is not None and not is_stacked:
            raise ValueError(
                f"{path} of the optimizer's state has a layer axis but no stacked parameter"
            )
        # An entry of a stacked parameter without a layer axis is shared by all layers.
        owners.append(None if is_stacked and axis is None else owner)
        axes.append(axis)
    shapes = tuple(jax.tree.leaves(state))
    return StateLayout(treedef, shapes, paths, tuple(owners), tuple(axes))


def _init(
    tx: optax.GradientTransformation, parts: Parts, length: int
) -> tuple[Any, list[LeafPlan]]:
    """Shapes of the state for ``length`` layers, and the plans of matrices."""
    with record_plans() as plans:
        # eval_shape caches by function and would not record plans again: pass a new function.
        params = parts.treedef.unflatten(parts.with_length(length))
        state = jax.eval_shape(lambda params: tx.init(params), params)
    return state, plans


def _layer_axis(path: str, here: tuple, there: tuple, length: int) -> int | None:
    if here == there:
        return None
    differing = [a for a, (m, n) in enumerate(zip(here, there, strict=False)) if m != n]
    if len(here) != len(there) or len(differing) > 1 or here[differing[0]] != length:
        raise ValueError(
            f"{path} of the optimizer's state mixes layers: it has shape {here} for {length} "
            f"layers, and {there} for another number"
        )
    return differing[0]


def _check_plans(parts: Parts, whole: Sequence[LeafPlan], single: Sequence[LeafPlan]) -> None:
    """Check that a single layer is planned in the same way as within the stack."""
    stacked = {parts.paths[i] for i in parts.stacked}
    for plan in whole:
        if plan.path in stacked and 0 not in plan.batch:
            raise ValueError(
                f"{plan.path}: axis 0 of {plan.shape}, the layer axis, is an axis of the matrix "
                "that is projected, clipped or normalised; leave the parameter out through where, "
                "or change axes"
            )
    # Sets: how often a parameter is planned depends on what JAX has traced before.
    as_single = {
        dataclasses.replace(p, shape=(1, *p.shape[1:])) if p.path in stacked else p for p in whole
    }
    names = {str(p.path) for p in as_single ^ set(single)}
    if names:
        raise ValueError(
            "where or axes treat one layer differently from the stack, for "
            f"{', '.join(sorted(names))}"
        )
