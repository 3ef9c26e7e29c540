"""Basis-dependent state of the optimizers inside a subspace, transported at a refresh."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import natgalore_jax._src.states.optax_types  # noqa: F401  registers the states of Optax
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.states.entries import Change, Fields, StateType, registered_entries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BasisState:
    """Fields of one state for one parameter, in low-rank coordinates."""

    fields: Fields  # the entry of each field; arrays have batch axes first
    meaning: StateType = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # low-rank
    batch: int = dataclasses.field(metadata={"static": True})

    def moved(self, transition: str, C_of_axis: Mapping[int, jax.Array]) -> "BasisState":
        """Transport the state of one matrix, without batch axes, to the new basis."""
        change = Change(transition, C_of_axis, self.shape, self.batch)
        return dataclasses.replace(self, fields=self.meaning.moved(self.fields, change))


def is_basis_state(x: Any) -> bool:
    return isinstance(x, BasisState)


# Keys are the positions of the arrays in the flat state, for :func:`put_back`.
BasisStates = dict[tuple[int, ...], BasisState]


def find_basis_states(
    state: Any, treedef: Any, plans: Sequence[LeafPlan | None]
) -> tuple[list[BasisStates], Any]:
    """Find the basis-dependent state of each parameter in the state of inner transformations.

    Args:
      state: of a transformation that runs inside the subspace, or of several.
      treedef: the structure of the parameters.
      plans: one entry for each parameter.

    Returns:
      The basis-dependent state of each parameter, and the skeleton for :func:`put_back`.
    """
    values, state_treedef = jax.tree.flatten(state)
    numbered = state_treedef.unflatten(range(len(values)))
    basis_states: list[BasisStates] = [{} for _ in plans]
    for meaning, entries_of_field in registered_entries(numbered, treedef):
        for leaf, plan in enumerate(plans):
            if plan is None:
                continue
            place = (plan.low_rank_shape, len(plan.batch))
            numbers = {name: entries[leaf] for name, entries in entries_of_field.items()}
            fields = jax.tree.map(values.__getitem__, numbers)
            moving = [name for name in fields if meaning.moves(name, fields[name], *place)]
            fields, numbers = ({name: x[name] for name in moving} for x in (fields, numbers))
            if arrays := tuple(jax.tree.leaves(numbers)):
                basis_states[leaf][arrays] = BasisState(fields, meaning, *place)
    return basis_states, (state_treedef, values)


def put_back(skeleton: Any, basis_states: Sequence[BasisStates]) -> Any:
    """The inner state with the given basis-dependent state put back."""
    treedef, values = skeleton
    values = list(values)
    for of_leaf in basis_states:
        for numbers, basis_state in of_leaf.items():
            for number, array in zip(numbers, jax.tree.leaves(basis_state), strict=True):
                values[number] = array
    return jax.tree.unflatten(treedef, values)
