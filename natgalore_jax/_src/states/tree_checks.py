"""Checks that trees at ``update`` match the trees at ``init``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.linear_codes import (
    LinearCodes,
    bits_of,
    coded_bits,
    codes_shape,
)
from natgalore_jax._src.params.context import is_layer_view, open_subspace
from natgalore_jax._src.params.placement import is_manual
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


def with_update_dtypes(out: Any, updates: Any, params: Any) -> Any:
    """The leaves of ``out`` in the dtypes that Optax gives to these updates."""
    leaves, treedef = jax.tree.flatten(out)
    return treedef.unflatten(map(jnp.astype, leaves, update_dtypes(updates, params)))


def check_params(updates: Any, params: Any) -> None:
    """Check that the updates have the structure and the shapes of the parameters, if given."""
    if params is None:
        return
    params = flatten_like(updates, params, "the parameters")
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(updates), params, strict=True):
        if jnp.shape(w) != jnp.shape(g):
            raise ValueError(
                f"{KeyPath(path)}: the update has shape {jnp.shape(g)}, but the parameter has "
                f"{jnp.shape(w)}"
            )


def sees_parts() -> bool:
    """Whether arrays are parts of parameters: one layer, or the shards of one device.

    Fewer moments of parts may be large enough for codes, so what init stored in 8 bits is unknown.
    """
    return is_layer_view() or is_manual()


class Form(NamedTuple):
    """Form of what is stored for one parameter."""

    shape: tuple[int, ...]
    #: A dtype, an entry of ``CODES``, or None: any dtype is required, but no codes.
    dtype: Any = None

    def __str__(self) -> str:
        return f"{self.shape}" if self.dtype is None else f"{self.shape} in {self.dtype}"


CODES = {4: "codes of 4 bits", 8: "codes of 8 bits"}


def form_in(dtype: Any, shape: Sequence[int], batch: int = 0) -> Form:
    """Form of an array that an option stores in ``dtype``; None: the parameter's dtype."""
    bits = coded_bits(dtype)
    if bits is not None and len(shape) > batch:
        return Form(codes_shape(shape, bits, batch), CODES[bits])
    if dtype is None or bits is not None:
        return Form(tuple(shape))
    return Form(tuple(shape), jax.dtypes.canonicalize_dtype(dtype))


def form_of(entry: Any) -> Form | None:
    """Form of an array or of :class:`LinearCodes`; None for a ``MaskedNode``."""
    if isinstance(entry, optax.MaskedNode):
        return None
    if isinstance(entry, LinearCodes):
        return Form(entry.codes.shape, CODES[bits_of(entry)])
    return Form(jnp.shape(entry), jnp.result_type(entry))


def fits(expected: Form | None, received: Form | None) -> bool:
    """Whether what is stored has the form that the options and the update require."""
    if expected is None or received is None:
        return expected is received
    if expected.dtype is None:
        return expected.shape == received.shape and not isinstance(received.dtype, str)
    return expected == received


def other_options(options: str) -> str:
    return f"the state was made for other parameters, or with another {options}"


def check_form(
    path: Any, shape: tuple[int, ...], expected: Any, received: Any, what: str, options: str
) -> None:
    """Check the form of what is stored for one parameter, for an update of this shape."""
    if not fits(expected, received):
        needed = f"no {what}" if expected is None else f"{what} of shape {expected}"
        found = "none" if received is None else f"shape {_shown(expected, received)}"
        raise ValueError(
            f"{KeyPath(path)}: the update has shape {shape}, which needs {needed}, but the state "
            f"has {found}: {other_options(options)}"
        )


def _shown(expected: Form | None, received: Form) -> Form:
    """``received`` without a dtype that options do not decide."""
    if isinstance(received.dtype, str) or (expected and expected.dtype is not None):
        return received
    return received._replace(dtype=None)


def check_type(state: Any, expected: type, options: str) -> None:
    """Check the type of a state."""
    if not isinstance(state, expected):
        raise ValueError(
            f"a {expected.__name__} is needed, but the state is of type {type(state).__name__}: "
            f"{other_options(options)}, or restored without a target"
        )


def check_bases(
    updates: Any, plans: Sequence[LeafPlan | None], bases: Sequence[Any], dtype: Any
) -> None:
    """Check that the bases made at init fit the updates' shapes.

    Args:
      bases: for each leaf and mode an array, :class:`LinearCodes` of arrays or ``MaskedNode``.
      dtype: ``basis_dtype``.
    """
    for (path, g), plan, entries in zip(
        jax.tree_util.tree_leaves_with_path(updates), plans, bases, strict=True
    ):
        received = [form_of(entry) for entry in entries]
        expected = [
            form_in(dtype, plan.factor_shape(mode), len(plan.batch))
            if plan and mode in plan.projected_modes
            else None
            for mode in range(len(entries))
        ]
        if not all(map(fits, expected, received)):
            shown = [r and _shown(e, r) for e, r in zip(expected, received, strict=True)]
            raise ValueError(
                f"{KeyPath(path)}: the update ({g.dtype}, {g.shape}) needs bases of shapes "
                f"{_by_mode(expected)}, but the bases made at init have {_by_mode(shown)}: "
                + other_options("rank, side, where or basis_dtype")
            )


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


def check_moments(
    updates: Any, plans: Sequence[LeafPlan | None], moments: Any, dtype: Any, options: str
) -> None:
    """Check that moments made at init fit: low-rank coordinates where a leaf is projected."""
    leaves = jax.tree.leaves(updates)
    shapes = [p.low_rank_shape if p else jnp.shape(g) for p, g in zip(plans, leaves, strict=True)]
    check_stored(updates, [form_in(dtype, x) for x in shapes], moments, "moments", options)


def check_stored(
    updates: Any, expected: Sequence[Form | None], stored: Any, what: str, options: str
) -> None:
    """Check a tree of parameters made at init.

    Args:
      updates: of the parameters.
      expected: the form that each leaf needs; None: nothing is stored.
      stored: the tree.
      what: is stored, for the error.
      options: that decide the form besides the shapes, for the error.
    """
    entries = flatten_like(updates, stored, "the parameters at init")
    for (path, g), form, entry in zip(
        jax.tree_util.tree_leaves_with_path(updates), expected, entries, strict=True
    ):
        check_form(path, jnp.shape(g), form, form_of(entry), what, options)


def _by_mode(forms: Sequence[Form | None]) -> str:
    """Forms with their modes: a transposed matrix has a basis of the same shape, of another."""
    modes = ("rows", "columns") if len(forms) == 2 else [f"mode {i}" for i in range(len(forms))]
    named = []
    for form, mode in zip(forms, modes, strict=True):
        if form is not None:
            in_dtype = "" if form.dtype is None else f" in {form.dtype}"
            named.append(f"{form.shape} of {mode}{in_dtype}")
    return ", ".join(named) or "none (not projected)"


def check_inner_states(
    inner: Sequence[optax.GradientTransformation],
    states: Sequence[Any],
    updates: Any,
    plans: Sequence[LeafPlan | None],
    known: dict[Any, Any],
) -> None:
    """Check that the states of the inner transformations fit the updates' shapes.

    The bases do not determine the unprojected axes. Without :func:`known_at_init` the first time
    costs a trace of ``init``.

    Args:
      known: the shapes by the kind of the updates. It must not outlive the transformations, which
        may hold tracers (:func:`optax.inject_hyperparams`).
    """
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    kind = treedef, low_rank, _ = _kind(updates, plans)
    if kind not in known:
        with open_subspace(plans):
            known[kind] = jax.eval_shape(
                lambda tree: [tx.init(tree) for tx in inner], treedef.unflatten(low_rank)
            )
    expected, states = known[kind], list(states)
    if jax.tree.structure(expected) != jax.tree.structure(states):
        if not sees_parts():
            _check_nodes(expected, states, ())
        return
    dtypes = {x.dtype for x in low_rank}
    for (path, actual), wanted in zip(
        jax.tree_util.tree_leaves_with_path(states), jax.tree.leaves(expected), strict=True
    ):
        if jnp.shape(actual) != wanted.shape:
            of_leaf = [f"{KeyPath(p)} {g.shape}" for p, g in leaves if _contains(path, p)]
            raise ValueError(
                f"the update of {' or '.join(of_leaf)} has another shape than at init: "
                f"{KeyPath(path[1:])} in the state of an inner transformation would have shape "
                f"{wanted.shape}, but has {jnp.shape(actual)}"
            )
        # The dtype of parameters at init, which may differ from that of the updates, is unknown.
        if wanted.dtype not in dtypes and _is_other_dtype(wanted.dtype, actual):
            raise ValueError(
                f"{KeyPath(path[1:])} in the state of an inner transformation has the dtype "
                f"{actual.dtype}, but its options need {wanted.dtype}: the state was made with "
                "other options, such as history_dtype or mu_dtype"
            )


def known_at_init(params: Any, plans: Sequence[LeafPlan | None], inner: Any) -> dict[Any, Any]:
    """The shapes of the inner states of :func:`check_inner_states` for ``params``."""
    return {_kind(params, plans): jax.eval_shape(lambda: inner)}


def _kind(tree: Any, plans: Sequence[LeafPlan | None]) -> tuple[Any, ...]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    low_rank = tuple(
        jax.ShapeDtypeStruct(plan.low_rank_shape, x.dtype) if plan else shape_and_dtype(path, x)
        for plan, (path, x) in zip(plans, leaves, strict=True)
    )
    return jax.tree.structure(tree), low_rank, tuple(plans)


def _is_other_dtype(expected: Any, x: Any) -> bool:
    """Whether x has another float dtype; float64 is a matter of JAX's configuration alone."""
    dtypes = (expected, getattr(x, "dtype", expected))
    are_float = all(jnp.issubdtype(t, jnp.floating) and t != jnp.float64 for t in dtypes)
    return are_float and dtypes[0] != dtypes[1]


def _type_in_state(node: Any) -> str:
    """The type of a state, else whether anything is stored."""
    if isinstance(node, optax.MaskedNode):
        return "nothing"
    return f"a {type(node).__name__}" if hasattr(node, "_fields") else "an array or a tree"


def _check_nodes(expected: Any, actual: Any, path: tuple[Any, ...]) -> None:
    """Check the types of states, and what is masked; Optax's states may gain keys after init."""
    (wanted, kind), (found, other_kind) = one_level(expected), one_level(actual)
    names = [_type_in_state(node) for node in (expected, actual)]
    if names[0] != names[1]:
        raise ValueError(
            f"{KeyPath(path[1:])} in the state of an inner transformation is {names[1]}, but its "
            f"options need {names[0]}: the state was made with other options, such as moment_bits, "
            "min_size or history_dtype, or restored without a target"
        )
    if kind == other_kind:
        for (key, own), (_, other) in zip(wanted, found, strict=True):
            if key:
                _check_nodes(own, other, (*path, *key))


def _contains(path: Sequence[Any], part: Sequence[Any]) -> bool:
    return any(
        tuple(path[i : i + len(part)]) == tuple(part) for i in range(len(path) - len(part) + 1)
    )
