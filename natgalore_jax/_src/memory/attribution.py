"""Attribution of the arrays of an optimizer's state to parameters and to parts of the method."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import optax

from natgalore_jax._src.kernels.stacks import bytes_of
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.states.entries import owners_of, parts_of


class Piece(NamedTuple):
    """One array of the state that belongs to one parameter."""

    part: str | None  # "basis", "history", "inner" or "other"
    size: Callable[[LeafPlan], int] | None  # see ``Part``
    shape: tuple[int, ...]
    bytes: int


def attribute(
    tx: optax.GradientTransformation, state: Any, treedef: Any
) -> tuple[list[list[Piece]], int]:
    """The pieces of each parameter, and the bytes of all other arrays.

    Args:
      tx: the transformation.
      state: its state, of arrays or shapes.
      treedef: the structure of the parameters.
    """
    leaves, state_treedef = jax.tree.flatten(state)
    numbered = state_treedef.unflatten(range(len(leaves)))
    parts = {number: part for part, number in parts_of(numbered)}
    try:
        owners = owners_of(tx, state, treedef)
    except Exception as error:
        # optax.tree.map_params calls init with placeholders, for which an init that reads its
        # parameters raises any error.
        warnings.warn(
            "this optimizer's init reads its parameters, which optax.tree.map_params does not "
            f"support ({type(error).__name__}: {error}): all of its state is counted as shared",
            stacklevel=3,
        )
        owners = [None] * len(leaves)
    pieces: list[list[Piece]] = [[] for _ in range(treedef.num_leaves)]
    shared = 0
    for number, (leaf, owner) in enumerate(zip(leaves, owners, strict=True)):
        if owner is None:
            shared += bytes_of(leaf)
        else:
            part = parts[number]
            pieces[owner].append(Piece(part.name, part.size, tuple(leaf.shape), bytes_of(leaf)))
    return pieces, shared


def alternatives(plan: LeafPlan, pieces: Sequence[Piece]) -> dict[str, int]:
    """Bytes of the state of one projected matrix by the side that is projected.

    Empty for Tucker, and for optimizers without a basis whose size depends on the side.
    """
    if len(plan.modes) > 2 or not any(piece.part == "basis" and piece.size for piece in pieces):
        return {}
    rank = next(r for r in plan.ranks if r is not None)
    left, right, both = (
        round(
            sum(
                _moved_bytes(piece, plan, dataclasses.replace(plan, ranks=ranks))
                for piece in pieces
            )
        )
        for ranks in ((rank, None), (None, rank), (rank, rank))
    )
    m, n = plan.mode_sizes
    return {
        "short": left if m <= n else right,
        "long": left if m >= n else right,
        "both": both,
        "left": left,
        "right": right,
    }


def _moved_bytes(piece: Piece, old: LeafPlan, new: LeafPlan) -> Fraction | int:
    """The bytes of a piece after a change of side."""
    size = piece.size
    if size is None:
        shape = old.low_rank_shape[len(old.batch) :]
        is_low_rank = len(piece.shape) >= len(shape) and piece.shape[-len(shape) :] == shape
        # A norm per layer may have the shape of R by chance: only inner arrays scale.
        if not (is_low_rank and piece.part == "inner"):
            return piece.bytes
        size = LeafPlan.low_rank_size
    return Fraction(piece.bytes * size(new), size(old))
