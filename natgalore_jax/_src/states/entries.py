"""Meaning of the arrays in an optimizer's state, registered by the state's type.

A type that is registered says which of its fields are trees of parameters, and what becomes of
their entries when a basis changes. Arrays of any other type are kept as they are.
"""

import dataclasses
import inspect
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
      resets: whether ``transition="reset"`` makes it zero. Set False where zero means something
        else than "nothing seen so far", as in a previous gradient; it then rotates.
    """

    resets: bool = True


@dataclasses.dataclass(frozen=True)
class SecondMoment:
    """A field that is a non-negative mean, sum or bound of squares (or sizes) of gradients.

    Attributes:
      mean: for centred moments, the field of the first moment μ whose square is subtracted from
        this ν; ν ≥ μ² then holds after every change of the basis. None: nothing is subtracted.
      resets: whether ``transition="reset"`` makes it zero. Set False where the optimizer divides by
        it before it adds the newest gradient; it then rotates.
      axes: for factored statistics, a function of the parameter's shape that gives, for each array
        of an entry, the axes of the parameter that its axes are. None: one array of all axes.
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
    """Some arrays of a state, for an account of its memory."""

    name: str | None  # "basis", "history", "inner" or "other"; None: that of the state around it
    tree: Any  # arrays; if ``size`` is None, other states may be among them
    # How many numbers there are of one parameter, up to a factor that does not depend on the side.
    # None: as many as before, or as many as R has where an inner array has the shape of R.
    size: Callable[[LeafPlan], int] | None = None


class StateType:
    """Meaning of a type of states; subclasses are registered beside their states."""

    roles: Mapping[str, Role] = {}

    def entries(self, state: Any, flatten: Callable[[Any], list[Any]]) -> dict[str, Sequence[Any]]:
        """For each field that is a tree of parameters, its entries; ``flatten`` takes it apart."""
        return {}

    def inner(self, state: Any) -> Any:
        """The other fields of the state, in which other states may be."""
        return ()

    def parts(self, state: Any) -> Sequence[Part] | None:
        """All arrays of the state, by what they are for; None: all for the same."""
        return None

    def moves(self, field: str, entry: Any, shape: tuple[int, ...], batch: int) -> bool:
        """Whether an entry follows the basis; its arrays then have batch axes first."""
        return True

    def moved(self, fields: Fields, change: Change) -> Fields:
        """The entries of one matrix, without batch axes, after a change of the basis."""
        raise NotImplementedError


class Moments(StateType):
    """A state whose fields are moments, in any wrapper."""

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
        # Means first: a centred moment needs the new one.
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


_REGISTERED: dict[type, StateType] = {}


def register_type(state_type: type, meaning: StateType) -> None:
    """Registers a type of states with a meaning of its own."""
    _REGISTERED[state_type] = meaning


def register_state(state_type: type, /, **fields: FirstMoment | SecondMoment) -> type:
    r"""Registers what the fields of an optimizer's state mean.

    When a basis changes from P to P', :func:`low_rank_project` transports the state of the
    optimizers inside the subspace: with :math:`C = P'^\top P`, a first moment becomes
    :math:`C M`; a second moment becomes
    :math:`v'_i = \sum_j C_{ij}^2 v_j + (1 - \sum_j C_{ij}^2)\, \bar v`; and a centred one
    :math:`v'_i = \kappa \mu_i'^2 + \sum_j C_{ij}^2 (v_j - \kappa \mu_j^2)
    + (1 - \sum_j C_{ij}^2)\, \bar v` with :math:`\kappa = \min v / \mu^2 \ge 1`.
    :func:`quantize_state` stores first moments in codes with a sign, second moments in codes
    without one, and centred pairs in full.

    What a field means is looked up by the type of the state, within chains, masks and other
    wrappers, and never guessed from names or shapes. The states of Optax are registered, but for
    statistics that have no meaning in other coordinates: step sizes, bets, estimates of the
    Hessian, parameters. A field that is not registered is kept as it is at a refresh, and in full
    precision by :func:`quantize_state`.

    Args:
      state_type: the type of the state, a NamedTuple or a dataclass that is a pytree. Its
        subclasses have the same meaning unless they are registered themselves. A second call
        replaces the first.
      fields: for each field that is a tree of parameters a :class:`FirstMoment` or a
        :class:`SecondMoment`. None at all: every field is kept.

    Returns:
      ``state_type``.

    Raises:
      TypeError: if ``state_type`` is not a type, or a field is given something else.
      ValueError: for a field that the type does not have, or a ``mean`` that is not among the
        first moments.

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
    known = getattr(state_type, "_fields", None) or [
        *getattr(state_type, "__dataclass_fields__", ())
    ]
    for name, role in fields.items():
        if not isinstance(role, (FirstMoment, SecondMoment)):
            raise TypeError(f"{name} must be a FirstMoment or a SecondMoment, got {role!r}")
        if name not in known:
            raise ValueError(f"{state_type.__name__} has the fields {list(known)}, got {name!r}")
        mean = role.mean if isinstance(role, SecondMoment) else None
        if mean is not None and not isinstance(fields.get(mean), FirstMoment):
            raise ValueError(f"the mean of {name} must be a FirstMoment of the state, got {mean!r}")
    register_type(state_type, Moments(fields))
    return state_type


def meaning_of(state: Any) -> StateType | None:
    """Registered meaning of the type of a state or of its nearest base."""
    return next((_REGISTERED[t] for t in type(state).__mro__ if t in _REGISTERED), None)


def registered_entries(
    state: Any, treedef: Any
) -> list[tuple[StateType, dict[str, Sequence[Any]]]]:
    """The registered states within a state, with the entries of their fields.

    Args:
      state: of any optimizer.
      treedef: the structure of the parameters.

    Returns:
      The meaning of each registered state, and for each of its fields one entry a parameter.
    """
    found = []
    for node in jax.tree.leaves(state, is_leaf=lambda x: meaning_of(x) is not None):
        meaning = meaning_of(node)
        if meaning is not None:
            own = meaning.entries(node, lambda tree: entries_of(tree, treedef))
            found += [(meaning, own), *registered_entries(meaning.inner(node), treedef)]
    return found


def entries_of(tree: Any, treedef: Any) -> list[Any]:
    """The entry of each parameter in a tree of them: an array, several, or a MaskedNode.

    A mask may leave out whole branches. A tree of another structure has no entries: all are masked.
    """
    numbers = treedef.unflatten(range(treedef.num_leaves))

    def below(x, part):
        return jax.tree.map(lambda _: x, part) if _is_hole(x) else x

    for candidate in (lambda: tree, lambda: jax.tree.map(below, tree, numbers, is_leaf=_is_hole)):
        try:
            return treedef.flatten_up_to(candidate())
        except ValueError:
            continue
    return [optax.MaskedNode()] * treedef.num_leaves


def parts_of(state: Any, name: str = "inner") -> Iterator[tuple[Part, Any]]:
    """Each array of a state, in the order of states within states, and the part that it is of."""

    def parts(x: Any) -> Sequence[Part] | None:
        meaning = meaning_of(x)
        return None if meaning is None else meaning.parts(x)

    for node in jax.tree.leaves(state, is_leaf=lambda x: parts(x) is not None):
        for part in parts(node) or ():
            own = part._replace(name=part.name or name)
            if part.size is None:
                yield from parts_of(part.tree, part.name or name)
            else:
                yield from ((own, leaf) for leaf in jax.tree.leaves(part.tree))
        if parts(node) is None:
            yield Part(name, node), node


def owners_of(tx: optax.GradientTransformation, state: Any, treedef: Any) -> list[int | None]:
    """For each array of a state the number of its parameter; None: of no one parameter.

    Args:
      tx: the transformation, which must support ``optax.tree.map_params``.
      state: its state, of arrays or shapes.
      treedef: the structure of the parameters.
    """
    owners: list[int | None] = [None] * len(jax.tree.leaves(state))

    def mark(tree):
        for owner, entry in enumerate(entries_of(tree, treedef)):
            for number in jax.tree.leaves(entry):
                owners[number] = owner

    numbered = jax.tree.unflatten(jax.tree.structure(state), range(len(owners)))
    optax.tree.map_params(tx.init, mark, numbered, is_leaf=lambda _: True)
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


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
