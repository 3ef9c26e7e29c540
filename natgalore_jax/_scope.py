"""What a transformation inside a subspace may ask about it while it is initialised.

``init`` receives only the low-rank tree, in which a projected matrix and an untouched one look the
same, and transformations may be nested inside others that know nothing of subspaces
(``optax.MultiSteps``, ``optax.masked``). So the open subspace is looked up by the path of a leaf.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

from natgalore_jax._plan import LeafPlan

_open: contextvars.ContextVar[Mapping[str, LeafPlan] | None] = contextvars.ContextVar(
    "open_subspace", default=None
)
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
