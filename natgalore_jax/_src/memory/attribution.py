"""Which parameter and which part of the method each array of an optimizer's state belongs to."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from natgalore_jax._src.low_bits.moments import QuantizedState
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.subspace.compact_fisher import CompactFisherState
from natgalore_jax._src.subspace.project import LowRankProjectState
from natgalore_jax._src.subspace.project_back import ProjectBackState
from natgalore_jax._src.subspace.woodbury import WoodburyState


class Piece(NamedTuple):
    """One array of the state that belongs to one parameter."""

    part: str  # "basis", "history", "inner" or "other"
    field: str  # "fisher", "columns" or "scales" in the states that have them here, or ""
    shape: tuple[int, ...]
    bytes: int


_OURS = (
    LowRankProjectState,
    WoodburyState,
    CompactFisherState,
    ProjectBackState,
    QuantizedState,
)


@dataclasses.dataclass(frozen=True)
class _ParamTree:
    """A part of the state that has the structure of the parameters, or one leaf of them masked."""

    tree: Any


def nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def attribute(
    tx: optax.GradientTransformation, state: Any, paths: Sequence[tuple[Any, ...]]
) -> tuple[list[list[Piece]], int]:
    """The pieces of each parameter, and the bytes of what belongs to none.

    Args:
      tx: the transformation.
      state: its state, of arrays or shapes.
      paths: the key path of each parameter.
    """
    owners = {path: i for i, path in enumerate(paths)}
    pieces: list[list[Piece]] = [[] for _ in paths]
    shared = 0
    for part, field, tree in _parts(_marked(tx, state)):
        if not isinstance(tree, _ParamTree):
            shared += nbytes(tree)
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree.tree):
            # An entry may be an array or a tree of its own; its path begins with the parameter's.
            known = [n for n in range(len(path), -1, -1) if path[:n] in owners]
            if known:
                piece = Piece(part, field, tuple(leaf.shape), nbytes(leaf))
                pieces[owners[path[: known[0]]]].append(piece)
            else:
                shared += nbytes(leaf)
    return pieces, shared


def _marked(tx: optax.GradientTransformation, state: Any) -> Any:
    """``state`` with every part that follows the parameters' structure wrapped up."""
    try:
        return optax.tree.map_params(tx.init, _ParamTree, state, is_leaf=lambda _: True)
    except Exception:
        # The state itself is sound, but tx looks into the parameters at init, and Optax's stand-in
        # for them has nothing to look at. What is raised then depends on tx alone.
        return state


def _parts(state: Any, part: str = "inner") -> Iterator[tuple[str, str, Any]]:
    """Each wrapped tree and each other leaf, with its part and its field in a state of ours."""
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, _OURS)):
        if isinstance(node, QuantizedState):
            yield from _parts((node.count, node.codes), part)
            yield from _named(part, "scales", node.scales)
        elif isinstance(node, CompactFisherState):
            yield from _named("history", "fisher", node.fisher)
            yield from _parts((node.count, node.inner), part)
        elif isinstance(node, WoodburyState):
            yield from _named("history", "columns", node.history.columns)
            yield from _parts((node.count, node.history._replace(columns=())), "history")
        elif isinstance(node, LowRankProjectState):
            yield from _named("basis", "basis", tuple(node))
        elif isinstance(node, ProjectBackState):
            yield from _parts(tuple(node), "other")
        else:
            yield part, "", node


def _named(part: str, field: str, tree: Any) -> Iterator[tuple[str, str, Any]]:
    for leaf in jax.tree.leaves(tree):
        yield part, field, leaf


def alternatives(plan: LeafPlan, pieces: Sequence[Piece]) -> dict[str, int]:
    """Bytes of the state of one projected matrix by the side that is projected.

    Empty for Tucker, and for optimizers without a stored basis of ours: their side is no choice.
    """
    if len(plan.modes) > 2 or not any(piece.part == "basis" for piece in pieces):
        return {}
    rank = next(r for r in plan.ranks if r is not None)
    left, right, both = (
        sum(_moved_bytes(piece, plan, dataclasses.replace(plan, ranks=ranks)) for piece in pieces)
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


def _moved_bytes(piece: Piece, old: LeafPlan, new: LeafPlan) -> int:
    """The bytes of a piece after a change of side."""
    if piece.part == "basis":
        return piece.bytes * _basis_size(new) // _basis_size(old)
    if piece.field == "fisher":
        return piece.bytes * len(new.projected_modes) // len(old.projected_modes)
    if piece.field in ("scales", "columns"):  # a scale stands for about as many numbers
        return piece.bytes * math.prod(new.low_rank_shape) // math.prod(old.low_rank_shape)
    shape = old.low_rank_shape[len(old.batch) :]
    is_low_rank = len(piece.shape) >= len(shape) and piece.shape[-len(shape) :] == shape
    # A Gram matrix or a norm per layer may have the shape of R by chance.
    if not (is_low_rank and piece.part == "inner"):
        return piece.bytes
    return piece.bytes * math.prod(new.low_rank_shape) // math.prod(old.low_rank_shape)


def _basis_size(plan: LeafPlan) -> int:
    return sum(math.prod(plan.factor_shape(mode)) for mode in plan.projected_modes)
