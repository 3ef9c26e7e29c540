"""Finds what an inner optimizer stores in low-rank coordinates, so that it can follow the basis."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgalore_jax._compact_fisher import FisherFactor
from natgalore_jax._history import History, PastGradients
from natgalore_jax._linear_codes import LinearCodes
from natgalore_jax._plan import LeafPlan
from natgalore_jax._quantize import block_max, blocks_between, decode, encode
from natgalore_jax._transition import rotate_linear, rotate_second_moment

# The names that Optax's states give to averages of squares; every other array of the shape of the
# low-rank gradient (mu, trace, ema, acc_grads, ...) is linear in the gradient.
SECOND_MOMENTS = frozenset({"nu", "nu_max", "v", "sum_of_squares", "v_row", "v_col"})

# The fields of a QuantizedState: two trees of the same structure.
_CODES, _SCALES = jax.tree_util.GetAttrKey("codes"), jax.tree_util.GetAttrKey("scales")


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMoment:
    """A moment of one parameter in 8 bits."""

    codes: jax.Array
    scale: jax.Array
    is_second: bool = dataclasses.field(metadata={"static": True})

    def moved(self, transition: str, C_of_axis: Mapping[int, jax.Array]) -> "QuantizedMoment":
        value = decode(self.codes, self.scale, is_second=self.is_second)
        value = Moment(value, self.is_second, None).moved(transition, C_of_axis).value
        scale = block_max(value, blocks_between(value.shape, self.scale.shape))
        codes = encode(value, scale, is_second=self.is_second)
        return dataclasses.replace(self, codes=codes, scale=scale)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A per-parameter entry of an inner state, and the number of its parameter."""

    value: Any
    leaf: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A leaf of an optimizer's state."""

    value: Any
    path: tuple[Any, ...]  # in the state, up to where the path in the tree of parameters begins
    leaf: int | None  # the number of its parameter, None for what belongs to none

    @property
    def name(self) -> str:
        """The field that it stands in."""
        return _field_name(self.path)


def entries_of(
    inner: optax.GradientTransformation, state: Any, params: Any
) -> tuple[list[Entry], Any]:
    """The leaves of a state, and its structure.

    ``optax.tree.map_params`` says which parts of the state belong to which parameter.

    Args:
      inner: the transformation.
      state: its state.
      params: the parameters, or anything of their structure.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    numbers = jax.tree.unflatten(jax.tree.structure(params), range(len(paths)))
    marked = optax.tree.map_params(
        inner.init,
        lambda value, leaf: value if isinstance(value, optax.MaskedNode) else _Slot(value, leaf),
        state,
        numbers,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        marked, is_leaf=lambda x: isinstance(x, _Slot)
    )
    return [
        Entry(x.value, path[: len(path) - len(paths[x.leaf])], x.leaf)
        if isinstance(x, _Slot)
        else Entry(x, path, None)
        for path, x in leaves
    ], treedef


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
    entries, treedef = entries_of(inner, state, low_rank)
    companions: list[dict[tuple[int, ...], Any]] = [{} for _ in plans]
    histories: dict[Any, dict[str, list[int]]] = {}
    scales: dict[Any, int] = {}
    for number, entry in enumerate(entries):
        plan = None if entry.leaf is None else plans[entry.leaf]
        if entry.leaf is None or plan is None:
            continue
        if entry.name == "fisher":
            axis = plan.low_rank_axes[entry.path[-1].idx]
            companions[entry.leaf][(number,)] = FisherFactor(entry.value, axis)
            continue
        field = entry.path[:-1] if entry.name in LinearCodes._fields else entry.path
        if _field_name(field) in History._fields:
            of_history = histories.setdefault((field[:-1], entry.leaf), {})
            of_history.setdefault(_field_name(field), []).append(number)
        if _field_name(field) == "columns":
            continue
        if _SCALES in entry.path:
            scales[(tuple(_CODES if k == _SCALES else k for k in entry.path), entry.leaf)] = number
            continue
        moment = _moment(entry.value, entry.name, plan)
        if moment is not None:
            companions[entry.leaf][(number,)] = moment
    values = [entry.value for entry in entries]
    numbers = {(entry.path, entry.leaf): number for number, entry in enumerate(entries)}
    for (path, leaf), of_scale in scales.items():
        number = numbers[(path, leaf)]
        moment = companions[leaf].pop((number,))
        companions[leaf][(number, of_scale)] = QuantizedMoment(
            moment.value, values[of_scale], moment.is_second
        )
    for (_, leaf), fields in histories.items():
        if len(fields) == len(History._fields):
            arrays = tuple(number for name in History._fields for number in fields[name])
            for number in arrays:  # a Gram matrix can have the shape of a moment by chance
                companions[leaf].pop((number,), None)
            stored = [[values[number] for number in fields[name]] for name in History._fields]
            columns, *rest = (x[0] if len(x) == 1 else LinearCodes(*x) for x in stored)
            plan = plans[leaf]
            shape = plan.low_rank_shape[len(plan.batch) :]
            companions[leaf][arrays] = PastGradients(History(columns, *rest), shape)
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


def companions_of_all(
    inner: Sequence[optax.GradientTransformation],
    states: Sequence[Any],
    low_rank: Any,
    plans: Sequence[LeafPlan | None],
) -> tuple[list[list[Any]], list[Any]]:
    """:func:`find_companions` in several states; each leaf gets a list with one entry per state."""
    of_leaf: list[list[Any]] = [[] for _ in plans]
    skeletons = []
    for tx, state in zip(inner, states, strict=True):
        found, skeleton = find_companions(tx, state, low_rank, plans)
        skeletons.append(skeleton)
        for own, companions in zip(of_leaf, found, strict=True):
            own.append(companions)
    return of_leaf, skeletons


def with_companions_of_all(skeletons: Sequence[Any], of_leaf: Sequence[Sequence[Any]]) -> list[Any]:
    """The states of :func:`companions_of_all` with the given companions."""
    return [
        with_companions(skeleton, [own[k] for own in of_leaf])
        for k, skeleton in enumerate(skeletons)
    ]


def _field_name(path: Sequence[Any]) -> str:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else ""


def _moment(value: Any, name: str, plan: LeafPlan) -> Moment | None:
    shape, low = tuple(value.shape), plan.low_rank_shape
    if shape == low:
        return Moment(value, name in SECOND_MOMENTS, None)
    if name in ("v_row", "v_col"):
        # Adafactor's factors of the second moment: the row statistics lack the larger of the two
        # largest axes, the column statistics the other.
        second, largest = np.argsort(low)[-2:]
        missing = int(largest if name == "v_row" else second)
        if shape == (*low[:missing], *low[missing + 1 :]) and missing >= len(plan.batch):
            return Moment(value, True, missing - len(plan.batch))
    return None
