"""Checks that trees at ``update`` match the trees at ``init``."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.linear_codes import LinearCodes, bits_of, codes_shape
from natgalore_jax._src.params.context import open_subspace
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.params.where import KeyPath, one_level, shape_and_dtype


def flatten_like(updates: Any, tree: Any, what: str) -> list[Any]:
    """The entries of ``tree`` for each leaf of ``updates``, or an error that names the paths."""
    try:
        return jax.tree.structure(updates).flatten_up_to(tree)
    except ValueError as error:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            shape_and_dtype(path, leaf)  # a whole model: its own error says how to filter it
        here, there = _paths(updates), _paths(tree)
        difference = (
            f"only in the updates: {_listed(here - there)}; only there: {_listed(there - here)}"
            if here != there
            else _other_container(updates, tree)
        )
        raise ValueError(
            f"the updates have another tree structure than {what}: {difference}"
        ) from error


def _other_container(updates: Any, tree: Any, path: tuple[Any, ...] = ()) -> str:
    """The first node of two trees with equal paths that is of another type or has other keys."""
    (mine, kind), (theirs, other_kind) = one_level(updates), one_level(tree)
    if kind != other_kind:
        types = [type(node).__name__ for node in (updates, tree)]
        if types[0] == types[1]:
            return f"{KeyPath(path)} is {kind}, and there {other_kind}"
        return f"{KeyPath(path)} is of type {types[0]}, and there of type {types[1]}"
    below = (
        _other_container(own, other, (*path, *key))
        for (key, own), (_, other) in zip(mine, theirs, strict=True)
        if key
    )
    return next(filter(None, below), "")


def _paths(tree: Any) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    return {str(KeyPath(path)) for path, _ in leaves}


def _listed(paths: set[str]) -> str:
    return ", ".join(sorted(paths)) or "nothing"


def with_dtypes_of(old: Any, new: Any) -> Any:
    """Cast floating-point arrays of a new state to the dtypes of the old state.

    States of Optax change to the dtype of the gradients at the first step, which compiles a second
    time and is an error in ``jax.lax.scan``.
    """
    if jax.tree.structure(old) != jax.tree.structure(new):
        return new

    def cast(x, y):
        both = [jnp.result_type(z) for z in (x, y)]
        is_cast = both[0] != both[1] and all(jnp.issubdtype(t, jnp.floating) for t in both)
        return y.astype(both[0]) if is_cast else y

    return jax.tree.map(cast, old, new)


@own_arithmetic
def update_dtypes(updates: Any, params: Any) -> list[Any]:
    """Dtype of the update of each leaf: the wider of gradient and parameter, as in Optax."""
    leaves, treedef = jax.tree.flatten(updates)
    params = leaves if params is None else treedef.flatten_up_to(params)
    return [jnp.result_type(g, w) for g, w in zip(leaves, params, strict=True)]


def check_params(updates: Any, params: Any) -> None:
    """Check that the updates have the structure and the shapes of the parameters."""
    params = flatten_like(updates, params, "the parameters")
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(updates), params, strict=True):
        if jnp.shape(w) != jnp.shape(g):
            raise ValueError(
                f"{KeyPath(path)}: the update has shape {jnp.shape(g)}, but the parameter has "
                f"{jnp.shape(w)}"
            )


def check_bases(updates: Any, plans: Sequence[LeafPlan | None], bases: Sequence[Any]) -> None:
    """Check that the bases made at init fit the updates' shapes.

    Args:
      bases: for each leaf and mode an array, :class:`LinearCodes` of arrays or ``MaskedNode``.
    """
    for (path, g), plan, entries in zip(
        jax.tree_util.tree_leaves_with_path(updates), plans, bases, strict=True
    ):
        received = [
            None
            if isinstance(e, optax.MaskedNode)
            else (e.codes if isinstance(e, LinearCodes) else e).shape
            for e in entries
        ]
        expected = [
            _stored_shape(plan, mode, entry) if plan and mode in plan.projected_modes else None
            for mode, entry in enumerate(entries)
        ]
        if received != expected:
            raise ValueError(
                f"{KeyPath(path)}: the update ({g.dtype}, {g.shape}) needs bases of shapes "
                f"{_by_mode(expected)}, but the bases made at init have {_by_mode(received)}"
            )


def _stored_shape(plan: LeafPlan, mode: int, stored: Any) -> tuple[int, ...]:
    shape = plan.factor_shape(mode)
    if isinstance(stored, LinearCodes):
        return codes_shape(shape, bits_of(stored), len(plan.batch))
    return shape


def check_low_rank(low: Any, params: Any, plans: Sequence[LeafPlan | None]) -> None:
    """Check that low-rank gradients fit the parameters: R where a parameter is projected."""
    shapes = [jnp.shape(w) for w in flatten_like(low, params, "the parameters")]
    for (path, r), shape, plan in zip(
        jax.tree_util.tree_leaves_with_path(low), shapes, plans, strict=True
    ):
        expected = plan.low_rank_shape if plan else shape
        if jnp.shape(r) != expected:
            raise ValueError(
                f"{KeyPath(path)}: the low-rank gradient of a parameter of shape {shape} has shape "
                f"{expected}, but received {jnp.shape(r)}"
            )


def check_moments(updates: Any, plans: Sequence[LeafPlan | None], moments: Any) -> None:
    """Check that moments made at init fit: low-rank coordinates where a leaf is projected."""
    leaves = jax.tree.leaves(updates)
    shapes = [p.low_rank_shape if p else jnp.shape(g) for p, g in zip(plans, leaves, strict=True)]
    check_stored(updates, shapes, moments, "moments")


def check_stored(
    updates: Any, expected: Sequence[tuple[int, ...] | None], stored: Any, what: str
) -> None:
    """Check that arrays made at init have the shapes ``expected``; None: nothing is stored."""
    entries = flatten_like(updates, stored, "the parameters at init")
    for (path, g), shape, entry in zip(
        jax.tree_util.tree_leaves_with_path(updates), expected, entries, strict=True
    ):
        received = None if isinstance(entry, optax.MaskedNode) else jnp.shape(entry)
        if received != shape:
            raise ValueError(
                f"{KeyPath(path)}: the update has shape {jnp.shape(g)}, which needs {what} of "
                f"shape {_or_none(shape)}, but at init it had {_or_none(received)}"
            )


def _or_none(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(shape)


def _by_mode(shapes: Sequence[tuple[int, ...] | None]) -> str:
    """Shapes with their modes: a transposed matrix has a basis of the same shape, of another."""
    modes = ("rows", "columns") if len(shapes) == 2 else [f"mode {i}" for i in range(len(shapes))]
    named = [f"{x} of {mode}" for x, mode in zip(shapes, modes, strict=True) if x is not None]
    return ", ".join(named) or "none (not projected)"


def check_inner_states(
    inner: Sequence[optax.GradientTransformation],
    states: Sequence[Any],
    updates: Any,
    plans: Sequence[LeafPlan | None],
    known: dict[Any, Any],
) -> None:
    """Check that the states of the inner transformations fit the updates' shapes.

    The bases do not determine the unprojected axes. Costs a trace of ``init`` the first time.

    Args:
      known: the results of these traces. It must not outlive the transformations, which may hold
        tracers (:func:`optax.inject_hyperparams`).
    """
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    low_rank = tuple(
        jax.ShapeDtypeStruct(plan.low_rank_shape, g.dtype) if plan else shape_and_dtype(path, g)
        for plan, (path, g) in zip(plans, leaves, strict=True)
    )
    treedef = jax.tree.structure(updates)
    kind = (treedef, low_rank, tuple(plans))
    if kind not in known:
        with open_subspace(plans):
            known[kind] = jax.eval_shape(
                lambda tree: [tx.init(tree) for tx in inner], treedef.unflatten(low_rank)
            )
    expected = known[kind]
    if jax.tree.structure(expected) != jax.tree.structure(list(states)):
        return
    for (path, actual), wanted in zip(
        jax.tree_util.tree_leaves_with_path(list(states)), jax.tree.leaves(expected), strict=True
    ):
        if jnp.shape(actual) != wanted.shape:
            of_leaf = [f"{KeyPath(p)} {g.shape}" for p, g in leaves if _contains(path, p)]
            raise ValueError(
                f"the update of {' or '.join(of_leaf)} has another shape than at init: "
                f"{KeyPath(path[1:])} in the state of an inner transformation would have shape "
                f"{wanted.shape}, but has {jnp.shape(actual)}"
            )


def _contains(path: Sequence[Any], part: Sequence[Any]) -> bool:
    return any(
        tuple(path[i : i + len(part)]) == tuple(part) for i in range(len(path) - len(part) + 1)
    )
