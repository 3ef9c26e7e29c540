"""Context of a subspace, for the transformations inside it and for layer-by-layer updates.

The low-rank tree that ``init`` receives does not show which matrices are projected, and Optax's
wrappers (``optax.MultiSteps``, ``optax.masked``) pass nothing else on. Therefore transformations
look up the plan of a leaf by its path in a context variable.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgalore_jax._src.params.plan import LeafPlan, within
from natgalore_jax._src.params.where import KeyPath

_open: contextvars.ContextVar[Mapping[KeyPath, LeafPlan] | None] = contextvars.ContextVar(
    "open_subspace", default=None
)
_layer: contextvars.ContextVar["LayerView | None"] = contextvars.ContextVar(
    "layer_view", default=None
)
# Part of JAX's tracing-cache key: a function traced for one view must not be reused for another.
_layer_key = jax.make_user_context(None)


@contextlib.contextmanager
def open_subspace(plans: Sequence[LeafPlan | None]) -> Iterator[None]:
    """Make the projected leaves the current subspace."""
    with within(_open, {plan.path: plan for plan in plans if plan}):
        yield


def current_subspace() -> Mapping[KeyPath, LeafPlan] | None:
    """The projected leaves by path, or None outside of a subspace."""
    return _open.get()


def plan_of(path: Sequence[Any], leaf: Any) -> LeafPlan | None:
    """Plan of a leaf of the tree with which a transformation inside a subspace is initialised.

    None for an unprojected leaf, and outside of a subspace.
    """
    plans, path = _open.get() or {}, KeyPath(path)
    plan = plans.get(path)
    # optax.flatten leaves the root alone, which else has a plan if there is any.
    is_hidden = plans and not path if plan is None else jnp.shape(leaf) != plan.low_rank_shape
    if is_hidden:
        raise ValueError(
            "optax.flatten inside a subspace hides which parameters are projected, which natural "
            "gradients need: leave out optax.flatten"
        )
    return plan


class LayerView(NamedTuple):
    """Part of the parameters that :func:`.per_layer` passes to ``update``.

    Stacked parameters, (L, ...), are one of their layers, (1, ...). Inactive parameters are zeros
    whose updates are discarded.
    """

    lengths: Mapping[KeyPath, int]  # by path: L, or 1 for a parameter that is not stacked
    active: frozenset[KeyPath]
    index: jax.Array  # shape (), int32: number of the layer


@contextlib.contextmanager
def layer_view(view: LayerView) -> Iterator[None]:
    """Make updates in this context updates of one layer."""
    with within(_layer, view), _layer_key(object()):
        yield


def is_active(plan: LeafPlan) -> bool:
    """Whether the update of a leaf is used."""
    view = _layer.get()
    return view is None or plan.path in view.active


def layer_index() -> jax.Array | int:
    """Index of the first layer of the stacked parameters in this view."""
    view = _layer.get()
    return 0 if view is None else view.index


def matrices_of(plan: LeafPlan) -> tuple[int, jax.Array | int]:
    """Number of matrices of the whole parameter, and index of the first matrix in this view."""
    view = _layer.get()
    if view is None:
        return plan.layers, 0
    if plan.path not in view.lengths:
        known = ", ".join(sorted(map(str, view.lengths))[:6])
        raise ValueError(
            f"{plan.path} is not a parameter of per_layer: {known}, ...; a transformation around a "
            "subspace must keep the tree of the parameters"
        )
    return plan.layers * view.lengths[plan.path], layer_index() * plan.layers


def is_layer_view() -> bool:
    """Whether updates are of one layer."""
    return _layer.get() is not None
