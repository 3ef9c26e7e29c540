"""Finds what an inner optimizer stores in low-rank coordinates, so that it can follow the basis."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgalore_jax._compact_fisher import FisherFactor
from natgalore_jax._history import History
from natgalore_jax._plan import LeafPlan
from natgalore_jax._transition import rotate_linear, rotate_second_moment

# The names that Optax's states give to averages of squares; every other array of the shape of the
# low-rank gradient (mu, trace, ema, acc_grads, ...) is linear in the gradient.
_SECOND_MOMENTS = frozenset({"nu", "nu_max", "v", "sum_of_squares", "v_row", "v_col"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moment:
    """A moment of one parameter: an array in low-rank coordinates, or factored, one axis fewer."""

    value: jax.Array
    is_second: bool = dataclasses.field(metadata={"static": True})
    missing_axis: int | None = dataclasses.field(metadata={"static": True})

    def moved(self, transition: str, C_of_axis: Mapping[int, jax.Array]) -> "Moment":
        if transition == "reset":
            return dataclasses.replace(self, value=jnp.zeros_like(self.value))
        if self.missing_axis is not None:
            C_of_axis = {
                axis - (axis > self.missing_axis): C
                for axis, C in C_of_axis.items()
                if axis != self.missing_axis
            }
        rotate = rotate_second_moment if self.is_second else rotate_linear
        return dataclasses.replace(self, value=rotate(self.value, C_of_axis))


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A per-parameter entry of an inner state, and the number of its parameter."""

    value: Any
    leaf: int


def find_companions(
    inner: optax.GradientTransformation, state: Any, low_rank: Any, plans: Sequence[LeafPlan | None]
) -> tuple[list[dict[tuple[int, ...], Any]], Any]:
    """The companions of each projected leaf within the state of one inner transformation.

    ``optax.tree.map_params`` says which parts of the state belong to which parameter; the name of
    the field and the shape say what they are.

    Args:
      inner: a transformation that runs inside the subspace.
      state: its state.
      low_rank: the low-rank tree, or anything of its structure.
      plans: one entry per leaf of ``low_rank``.

    Returns:
      For each leaf a dict of companions, keyed by the numbers of their arrays in the flat state,
      and what :func:`with_companions` needs to put them back.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(low_rank)]
    numbers = jax.tree.unflatten(jax.tree.structure(low_rank), range(len(paths)))
    marked = optax.tree.map_params(
        inner.init,
        lambda value, leaf: value if isinstance(value, optax.MaskedNode) else _Slot(value, leaf),
        state,
        numbers,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    entries, treedef = jax.tree_util.tree_flatten_with_path(
        marked, is_leaf=lambda x: isinstance(x, _Slot)
    )
    companions: list[dict[tuple[int, ...], Any]] = [{} for _ in plans]
    histories: dict[Any, dict[str, int]] = {}
    for number, (path, entry) in enumerate(entries):
        plan = plans[entry.leaf] if isinstance(entry, _Slot) else None
        if plan is None:
            continue
        in_state = path[: len(path) - len(paths[entry.leaf])]
        name = _field_name(in_state)
        if name == "fisher":
            axis = plan.low_rank_axes[in_state[-1].idx]
            companions[entry.leaf][(number,)] = FisherFactor(entry.value, axis)
            continue
        if name in History._fields:
            histories.setdefault((in_state[:-1], entry.leaf), {})[name] = number
        moment = _moment(entry.value, name, plan)
        if moment is not None:
            companions[entry.leaf][(number,)] = moment
    values = [e.value if isinstance(e, _Slot) else e for _, e in entries]
    for (_, leaf), fields in histories.items():
        if len(fields) == len(History._fields):
            arrays = tuple(fields[name] for name in History._fields)
            for number in arrays:  # a Gram matrix can have the shape of a moment by chance
                companions[leaf].pop((number,), None)
            companions[leaf][arrays] = History(*(values[number] for number in arrays))
    return companions, (treedef, values)


def with_companions(skeleton: Any, companions: Sequence[Mapping[tuple[int, ...], Any]]) -> Any:
    """The inner state with the given companions in the place of the ones that were found."""
    treedef, values = skeleton
    values = list(values)
    for of_leaf in companions:
        for numbers, companion in of_leaf.items():
            for number, array in zip(numbers, jax.tree.leaves(companion), strict=True):
                values[number] = array
    return jax.tree.unflatten(treedef, values)


def _field_name(path: Sequence[Any]) -> str:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""


def _moment(value: Any, name: str, plan: LeafPlan) -> Moment | None:
    shape, low = tuple(value.shape), plan.low_rank_shape
    if shape == low:
        return Moment(value, name in _SECOND_MOMENTS, None)
    if name in ("v_row", "v_col"):
        # Adafactor's factors of the second moment: the row statistics lack the larger of the two
        # largest axes, the column statistics the other.
        second, largest = np.argsort(low)[-2:]
        missing = int(largest if name == "v_row" else second)
        if shape == (*low[:missing], *low[missing + 1 :]) and missing >= len(plan.batch):
            return Moment(value, True, missing - len(plan.batch))
    return None
