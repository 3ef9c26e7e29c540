"""Context of a subspace, for the transformations inside it and for layer-by-layer updates.

``init`` receives only the low-rank tree, in which a projected matrix and an untouched one look the
same, and transformations may be nested inside others that know nothing of subspaces
(``optax.MultiSteps``, ``optax.masked``). So the open subspace is looked up by the path of a leaf.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from natgalore_jax._src.params.plan import LeafPlan

_open: contextvars.ContextVar[Mapping[str, LeafPlan] | None] = contextvars.ContextVar(
    "open_subspace", default=None
)
_layer: contextvars.ContextVar["LayerView | None"] = contextvars.ContextVar(
    "layer_view", default=None
)
# A function that JAX traced for one view must not be taken for another: this is a part of the key
# under which it looks for what it has traced.
_layer_key = jax.make_user_context(None)
_recorded: contextvars.ContextVar[list[LeafPlan] | None] = contextvars.ContextVar(
    "recorded_plans", default=None
)


@contextlib.contextmanager
def open_subspace(plans: Mapping[str, LeafPlan]) -> Iterator[None]:
    """Announces the projected leaves, by path, to what is initialised in this context."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.extend(plans.values())
    token = _open.set(plans)
    try:
        yield
    finally:
        _open.reset(token)


def current_subspace() -> Mapping[str, LeafPlan] | None:
    """The projected leaves by path, or None outside of a subspace."""
    return _open.get()


@contextlib.contextmanager
def record_plans() -> Iterator[list[LeafPlan]]:
    """Collects the plans of every subspace that is opened in this context, however deep."""
    plans: list[LeafPlan] = []
    token = _recorded.set(plans)
    try:
        yield plans
    finally:
        _recorded.reset(token)


class LayerView(NamedTuple):
    """Part of the parameters that :func:`.per_layer` gives to ``update`` instead of all.

    Stacked parameters, (L, ...), are one of their layers, (1, ...), and parameters that are not
    active are zeros whose updates nobody reads.
    """

    lengths: Mapping[str, int]  # L for each parameter by path, 1 where it is not stacked
    active: frozenset[str]  # paths
    index: jax.Array  # shape (), int32: which layer


@contextlib.contextmanager
def layer_view(view: LayerView) -> Iterator[None]:
    """Announces that updates in this context are of one layer."""
    token = _layer.set(view)
    try:
        with _layer_key(object()):
            yield
    finally:
        _layer.reset(token)


def is_active(plan: LeafPlan) -> bool:
    """Whether the update of a leaf is asked for."""
    view = _layer.get()
    return view is None or plan.path in view.active


def layer_index() -> jax.Array | int:
    """Number of the first layer of the stacked parameters that is here."""
    view = _layer.get()
    return 0 if view is None else view.index


def matrices_of(plan: LeafPlan) -> tuple[int, jax.Array | int]:
    """Number of matrices of the whole parameter, and number of the first matrix that is here."""
    view = _layer.get()
    if view is None:
        return plan.layers, 0
    if plan.path not in view.lengths:
        raise ValueError(
            f"{plan.path} is no parameter that per_layer was given: "
            f"{', '.join(sorted(view.lengths)[:6])}, ...; a transformation around a subspace must "
            "keep the tree of the parameters"
        )
    return plan.layers * view.lengths[plan.path], layer_index() * plan.layers


def is_layer_view() -> bool:
    """Whether updates are of one layer."""
    return _layer.get() is not None
