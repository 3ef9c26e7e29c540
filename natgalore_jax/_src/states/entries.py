"""Meaning of the arrays in an optimizer's state, registered by the state's type.

A registered type declares which of its fields are trees of parameters, and how their entries are
transported at a refresh. Arrays of any other type are kept.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.float8_blocks import MomentCodes, load_moment, store_moment
from natgalore_jax._src.kernels.rotation import rotate_centred, rotate_linear, rotate_second_moment
from natgalore_jax._src.params.plan import LeafPlan

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class FirstMoment:
    """A field that is linear in the gradients: a momentum, a previous or accumulated gradient.

    Attributes:
      resets: whether ``transition="reset"`` sets it to zero. Set False if zero is not the initial
        value, as in a previous gradient; the field then rotates.
    """

    resets: bool = True


@dataclasses.dataclass(frozen=True)
class SecondMoment:
    """A field that is a non-negative mean, sum or bound of squares (or sizes) of gradients.

    Attributes:
      mean: for centred moments, the field of the first moment μ whose square the optimizer
        subtracts from this ν; ν ≥ μ² is preserved at a refresh. None: ν is not centred.
      resets: whether ``transition="reset"`` sets it to zero. Set False if the optimizer divides by
        it before adding the newest gradient; the field then rotates.
      axes: for factored statistics, a function of the parameter's shape that returns, for each
        array of an entry, the axes of the parameter that it has. None: one array of all axes.
    """

    mean: str | None = None
    resets: bool = True
    axes: Any = None


Role = FirstMoment | SecondMoment


class Change(NamedTuple):
    """A change of the basis of one matrix."""

    transition: str  # "rotate" or "reset"
    C_of_axis: Mapping[int, jax.Array]  # by axis without batch axes, in the order of modes
    shape: tuple[int, ...]  # of the low-rank gradient, batch axes first
    batch: int  # the number of batch axes

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        return self.shape[self.batch :]


class Part(NamedTuple):
    """Arrays of a state that are reported together in memory reports."""

    name: str | None  # "basis", "history", "inner" or "other"; None: inherited from the outer state
    tree: Any  # arrays; states too if ``size`` is None
    # Size for one parameter, up to a factor that does not depend on the projected side. None: the
    # side changes the size of inner arrays that have the shape of R, and of no others.
    size: Callable[[LeafPlan], int] | None = None


class StateType:
    """Meaning of a type of states; subclasses are registered next to the state's definition."""

    roles: Mapping[str, Role] = {}

    def entries(self, state: Any, flatten: Callable[[Any], list[Any]]) -> dict[str, Sequence[Any]]:
        """Entries of each field that is a tree of parameters; ``flatten`` flattens such a tree."""
        return {}

    def inner(self, state: Any) -> Any:
        """All other fields of the state, which may contain states."""
        return ()

    def parts(self, state: Any) -> Sequence[Part] | None:
        """All arrays of the state by part; None: one part, inherited from the outer state."""
        return None

    def moves(self, field: str, entry: Any, shape: tuple[int, ...], batch: int) -> bool:
        """Whether an entry is transported at a refresh; its arrays then have batch axes first."""
        return True

    def moved(self, fields: Fields, change: Change) -> Fields:
        """Transport the entries of one matrix, without batch axes, to the new basis."""
        raise NotImplementedError


class Moments(StateType):
    """A state whose fields are moments."""

    def __init__(self, roles: Mapping[str, Role]):
        self.roles = dict(roles)

    def entries(self, state, flatten):
        return {name: flatten(getattr(state, name)) for name in self.roles}

    def inner(self, state):
        children, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: x is not state)
        return [x for path, x in children if getattr(path[0], "name", None) not in self.roles]

    def moves(self, field, entry, shape, batch):
        arrays, axes = _arrays(entry), _axes_of(self.roles[field], shape)
        return len(arrays) == len(axes) and all(
            x.shape == tuple(shape[a] for a in own) and own[:batch] == tuple(range(batch))
            for x, own in zip(arrays, axes, strict=True)
        )

    def moved(self, fields, change):
        new: Fields = {}
        # Means first: a centred moment needs the new mean.
        for name in sorted(fields, key=lambda name: isinstance(self.roles[name], SecondMoment)):
            role, entry = self.roles[name], fields[name]
            is_second = isinstance(role, SecondMoment)
            leaves, treedef = jax.tree.flatten(entry, is_leaf=_is_codes)
            out = []
            for stored, axes in zip(leaves, _axes_of(role, change.shape), strict=True):
                own = axes[change.batch :]
                C_of_axis = {
                    own.index(change.batch + a): C
                    for a, C in change.C_of_axis.items()
                    if change.batch + a in own
                }
                value = load_moment(stored, is_second=is_second)
                if change.transition == "reset" and role.resets:
                    value = jnp.zeros_like(value)
                elif isinstance(role, SecondMoment) and role.mean in new:
                    means = (fields[role.mean], new[role.mean])
                    value = rotate_centred(value, *means, C_of_axis)
                else:
                    rotate = rotate_second_moment if is_second else rotate_linear
                    value = rotate(value, C_of_axis)
                out.append(store_moment(value, stored, is_second=is_second))
            new[name] = treedef.unflatten(out)
        return new


class OwnBasis(StateType):
    """A state with a field ``basis`` of an optimizer that projects by itself, without a choice."""

    def inner(self, state):
        return tuple(state)

    def parts(self, state):
        others = [x for name, x in state._asdict().items() if name != "basis"]
        return [Part("basis", state.basis), Part(None, others)]


_REGISTERED: dict[type, StateType] = {}


def register_type(state_type: type, meaning: StateType) -> None:
    """Register the meaning of a type of states."""
    _REGISTERED[state_type] = meaning


def register_state(state_type: type, /, **fields: FirstMoment | SecondMoment) -> type:
    r"""Register the meaning of the fields of an optimizer's state.

    When a basis changes from P to P', :func:`low_rank_project` transports the state of the
    optimizers inside the subspace: with :math:`C = P'^\top P`, a first moment becomes
    :math:`C M`, a second moment
    :math:`v'_i = \sum_j C_{ij}^2 v_j + (1 - \sum_j C_{ij}^2)\, \bar v`, and a centred second moment
    :math:`v'_i = \kappa \mu_i'^2 + \sum_j C_{ij}^2 (v_j - \kappa \mu_j^2)
    + (1 - \sum_j C_{ij}^2)\, \bar v` with :math:`\kappa = \min v / \mu^2 \ge 1`.
    :func:`quantize_state` stores first moments in signed codes, second moments in unsigned codes,
    and centred pairs in full precision.

    The meaning of a field is looked up by the type of the state, within chains, masks and other
    wrappers that keep the tree of the parameters (not ``optax.flatten``, an error at ``init``), and
    never guessed from names or shapes. The states of Optax are registered, except for
    statistics without a meaning in other coordinates: step sizes, bets, estimates of the Hessian,
    parameters. Unregistered fields are kept at a refresh, and :func:`quantize_state` keeps them in
    full precision.

    Args:
      state_type: the type of the state, a NamedTuple or a dataclass that is a pytree. Subclasses
        inherit the meaning unless they are registered themselves. A second call replaces the first.
      fields: a :class:`FirstMoment` or a :class:`SecondMoment` for each field that is a tree of
        parameters. Without any, every field is kept.

    Returns:
      ``state_type``.

    Raises:
      TypeError: if ``state_type`` is not a type, or a field is neither kind of moment.
      ValueError: for a field that the type does not have, or a ``mean`` that is not a first moment.

    Example:
      >>> import typing, natgalore_jax as ng
      >>> class MyState(typing.NamedTuple):
      ...     average: typing.Any
      ...     squares: typing.Any
      ...     step_sizes: typing.Any
      >>> ng.register_state(MyState, average=ng.FirstMoment(), squares=ng.SecondMoment()).__name__
      'MyState'
    """
    if not inspect.isclass(state_type):
        raise TypeError(f"state_type must be a type, got {state_type!r}")
    names = getattr(state_type, "_fields", None) or [
        *getattr(state_type, "__dataclass_fields__", ())
    ]
    for name, role in fields.items():
        if not isinstance(role, (FirstMoment, SecondMoment)):
            raise TypeError(f"{name} must be a FirstMoment or a SecondMoment, got {role!r}")
        if name not in names:
            raise ValueError(f"{state_type.__name__} has the fields {list(names)}, got {name!r}")
        mean = role.mean if isinstance(role, SecondMoment) else None
        if mean is not None and not isinstance(fields.get(mean), FirstMoment):
            raise ValueError(f"the mean of {name} must be a FirstMoment of the state, got {mean!r}")
    register_type(state_type, Moments(fields))
    return state_type


def meaning_of(state: Any) -> StateType | None:
    """Meaning of the nearest registered base of a state's type."""
    return next((_REGISTERED[t] for t in type(state).__mro__ if t in _REGISTERED), None)


def registered_entries(
    state: Any, treedef: Any
) -> list[tuple[StateType, dict[str, Sequence[Any]]]]:
    """The registered states within a state, with the entries of their fields.

    Args:
      state: of any optimizer.
      treedef: the structure of the parameters.

    Returns:
      The meaning of each registered state, and one entry per parameter for each of its fields.
    """
    return [
        (meaning, meaning.entries(node, lambda tree: entries_of(tree, treedef)))
        for meaning, node in registered_states(state)
    ]


def check_entries(state: Any, params: Any, task: str, instead: str) -> None:
    """Check that every registered tree of parameters in a state has their structure.

    Args:
      state: of an optimizer, from ``init(params)``.
      params: arrays or shapes.
      task: what is done with the moments of each parameter, for the error.
      instead: what to do instead of ``optax.flatten``, for the error.
    """
    leaves, treedef = jax.tree.flatten(params)

    def flatten(tree):
        entries = _entries_or_none(tree, treedef)
        # A tree that is a single array has no other structure, but another number of axes.
        is_array = treedef.num_nodes == 1
        if entries is None or (is_array and any(map(_is_flattened, entries, leaves))):
            raise ValueError(
                f"{name} inside optax.flatten has no entry for each parameter, but moments are "
                f"{task} by parameter: {instead}"
            )
        return entries

    for meaning, node in registered_states(state):
        name = type(node).__name__
        meaning.entries(node, flatten)


def _is_flattened(entry: Any, leaf: Any) -> bool:
    """Whether an entry has the numbers of a matrix in a vector."""
    shape = jnp.shape(leaf)
    return len(shape) > 1 and [x.shape for x in _arrays(entry)] == [(math.prod(shape),)]


def registered_states(state: Any) -> Iterator[tuple[StateType, Any]]:
    """The registered states within a state, with their meaning, outer states first."""
    for node in jax.tree.leaves(state, is_leaf=lambda x: meaning_of(x) is not None):
        meaning = meaning_of(node)
        if meaning is not None:
            yield meaning, node
            yield from registered_states(meaning.inner(node))


def entries_of(tree: Any, treedef: Any) -> list[Any]:
    """The entry of each parameter in a tree of parameters: an array, several, or a MaskedNode.

    A mask may cover whole branches. In a tree of another structure all parameters are masked.
    """
    entries = _entries_or_none(tree, treedef)
    return [optax.MaskedNode()] * treedef.num_leaves if entries is None else entries


def _entries_or_none(tree: Any, treedef: Any) -> list[Any] | None:
    """The entry of each parameter; None if the tree has another structure."""
    params = treedef.unflatten(range(treedef.num_leaves))

    def below(x, part):
        return jax.tree.map(lambda _: x, part) if is_masked(x) else x

    # As it is, then with a MaskedNode for each parameter of a branch that is masked as a whole.
    for candidate in (lambda: tree, lambda: jax.tree.map(below, tree, params, is_leaf=is_masked)):
        try:
            return treedef.flatten_up_to(candidate())
        except ValueError:
            continue
    return None


def parts_of(state: Any, name: str = "inner") -> Iterator[tuple[Part, Any]]:
    """Each array of a state with its part, depth first."""

    def parts(x: Any) -> Sequence[Part] | None:
        meaning = meaning_of(x)
        return None if meaning is None else meaning.parts(x)

    for node in jax.tree.leaves(state, is_leaf=lambda x: parts(x) is not None):
        found = parts(node)
        if found is None:
            yield Part(name, node), node
            continue
        for part in found:
            own_name = part.name or name
            if part.size is None:
                yield from parts_of(part.tree, own_name)
            else:
                own = part._replace(name=own_name)
                yield from ((own, leaf) for leaf in jax.tree.leaves(part.tree))


def owners_of(tx: optax.GradientTransformation, state: Any, treedef: Any) -> list[int | None]:
    """For each array of a state the number of its parameter; None for shared arrays.

    Args:
      tx: the transformation, which must support ``optax.tree.map_params``.
      state: its state, of arrays or shapes.
      treedef: the structure of the parameters.
    """
    own = jax.tree.structure(state)
    owners: list[int | None] = [None] * own.num_leaves
    # A state with numbers in place of its arrays: each tree of parameters that Optax finds in it
    # then has the numbers of its arrays.
    numbered, trees = own.unflatten(range(own.num_leaves)), []
    optax.tree.map_params(tx.init, trees.append, numbered, is_leaf=lambda _: True)
    for tree in trees:
        for owner, entry in enumerate(entries_of(tree, treedef)):
            for number in jax.tree.leaves(entry):
                owners[number] = owner
    return owners


def _axes_of(role: Role, shape: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
    if isinstance(role, SecondMoment) and role.axes is not None:
        return role.axes(shape)
    return [tuple(range(len(shape)))]


def _arrays(entry: Any) -> list[Any]:
    leaves = jax.tree.leaves(entry, is_leaf=_is_codes)
    return [x.codes if isinstance(x, MomentCodes) else x for x in leaves]


def _is_codes(x: Any) -> bool:
    return isinstance(x, MomentCodes)


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
