"""Plan of the projection of each parameter, from names and shapes alone."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.params.axes import AxesLike, MatrixAxes, axes_per_leaf
from natgalore_jax._src.params.checks import check_integer
from natgalore_jax._src.params.where import (
    KeyPath,
    Where,
    hidden_matrices,
    selected,
    shape_and_dtype,
)

_recorded: contextvars.ContextVar[list["LeafPlan"] | None] = contextvars.ContextVar(
    "recorded_plans", default=None
)

Side = Literal["short", "long", "left", "right", "both"]


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """One projected parameter: its modes, and the rank of each mode that is projected.

    A mode is a group of axes. A matrix has two modes, rows and columns; Tucker has one per axis.
    In low-rank coordinates the axes are batch, then modes; a projected mode is one axis of length
    rank.
    """

    path: KeyPath
    shape: tuple[int, ...]
    batch: tuple[int, ...]  # axes of independent matrices
    modes: tuple[tuple[int, ...], ...]  # the axes of each mode
    ranks: tuple[int | None, ...]  # rank of each mode, None for a mode that is not projected

    @property
    def unnamed(self) -> "LeafPlan":
        """The plan without its path, equal for all parameters of this shape."""
        return dataclasses.replace(self, path=KeyPath())

    def stacked(self, length: int) -> "LeafPlan":
        """The plan of a stack of such parameters, with a new first axis."""
        batch = (0, *(a + 1 for a in self.batch))
        modes = tuple(tuple(a + 1 for a in mode) for mode in self.modes)
        return LeafPlan(self.path, (length, *self.shape), batch, modes, self.ranks)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.batch)

    @property
    def matrix_axes(self) -> tuple[int, ...]:
        """All axes but the batch axes, in order."""
        return tuple(a for a in range(len(self.shape)) if a not in self.batch)

    @property
    def layers(self) -> int:
        """The number of independent matrices."""
        return math.prod(self.batch_shape)

    @property
    def mode_sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[a] for a in mode) for mode in self.modes)

    @property
    def projected_modes(self) -> tuple[int, ...]:
        return tuple(i for i, rank in enumerate(self.ranks) if rank is not None)

    @property
    def is_one_sided(self) -> bool:
        """Whether it is a matrix with one projected side."""
        return len(self.modes) == 2 and len(self.projected_modes) == 1

    def rank_of(self, mode: int) -> int:
        """The rank of a projected mode."""
        rank = self.ranks[mode]
        assert rank is not None, f"mode {mode} of {self.path} is not projected"
        return rank

    def mode_shape(self, mode: int) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.modes[mode])

    def factor_shape(self, mode: int) -> tuple[int, ...]:
        """Shape of one mode's basis: batch, the axes of the mode, rank."""
        return (*self.batch_shape, *self.mode_shape(mode), self.rank_of(mode))

    @property
    def low_rank_axes(self) -> tuple[int, ...]:
        """First axis of each mode in low-rank coordinates, counted after the batch axes."""
        widths = [
            1 if r is not None else len(m) for m, r in zip(self.modes, self.ranks, strict=True)
        ]
        return tuple(sum(widths[:i]) for i in range(len(widths)))

    @property
    def low_rank_shape(self) -> tuple[int, ...]:
        shape = list(self.batch_shape)
        for i, rank in enumerate(self.ranks):
            shape += self.mode_shape(i) if rank is None else (rank,)
        return tuple(shape)

    def low_rank_size(self) -> int:
        return math.prod(self.low_rank_shape)

    def basis_size(self) -> int:
        return sum(math.prod(self.factor_shape(mode)) for mode in self.projected_modes)


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """The arguments of ``low_rank_project`` that decide which parameters are projected and how."""

    rank: int | tuple[int, ...] | None  # None: matrices are planned but not projected
    where: Where
    axes: AxesLike
    side: str = "short"


def check_rank(rank: Any) -> None:
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        if len(rank) < 3:
            raise ValueError(
                "rank as a tuple needs one entry per mode of a tensor with more than two modes, "
                f"got {rank!r}; a matrix takes one integer rank"
            )
        for entry in rank:
            check_integer("rank", entry, minimum=1)
    else:
        check_integer("rank", rank, minimum=1)


@contextlib.contextmanager
def within(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
    """Set a context variable."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def plan_tree(settings: PlanSettings, tree: Any) -> list[LeafPlan | None]:
    """One entry per leaf of ``tree``, parameters or gradients: its plan, or None without a matrix.

    A plan is for leaves that are selected and not empty.
    """
    plans: list[LeafPlan | None] = []
    for (keys, leaf), axes, is_chosen in zip(
        jax.tree_util.tree_leaves_with_path(tree),
        axes_per_leaf(settings.axes, tree),
        selected(settings.where, tree),
        strict=True,
    ):
        path, leaf = KeyPath(keys), shape_and_dtype(keys, leaf)
        if not is_chosen or axes is None or 0 in leaf.shape:  # 0: a stack of no layers
            plans.append(None)
            continue
        _check_dtype(path, leaf)
        plans.append(_plan_leaf(settings, path, leaf.shape, axes))
    recorded = _recorded.get()
    if recorded is not None:
        recorded.extend(plan for plan in plans if plan)
    return plans


@contextlib.contextmanager
def record_plans() -> Iterator[list[LeafPlan]]:
    """Collect the plans of all trees that are planned in this context."""
    plans: list[LeafPlan] = []
    with within(_recorded, plans):
        yield plans


def without_matrices(treedef: Any, leaves: Sequence[Any], plans: Sequence[Any]) -> Any:
    """The tree of the leaves without a plan, with MaskedNode for all others."""
    return treedef.unflatten(
        optax.MaskedNode() if plan else x for plan, x in zip(plans, leaves, strict=True)
    )


def require_projection(settings: PlanSettings, plans: Sequence[LeafPlan | None], tree: Any) -> None:
    """Raise if nothing is projected, a mistake in ``where``, ``axes`` or the rank."""
    eligible = "matrices with both sides larger than the rank"
    if isinstance(settings.rank, Sequence):
        eligible = f"parameters with {len(settings.rank)} or more axes"
    require_matrices(
        settings,
        plans,
        tree,
        f"where selects no parameter to project at rank {settings.rank}. The default rule takes "
        f"{eligible} that are not embeddings or the output head",
    )


def require_matrices(
    settings: PlanSettings, plans: Sequence[LeafPlan | None], tree: Any, fault: str
) -> None:
    """Raise if no matrix is selected, a mistake in ``where`` or ``axes``."""
    if any(plan is not None for plan in plans):
        return
    named = jax.tree_util.tree_leaves_with_path(tree)
    every = zip(
        named, axes_per_leaf(settings.axes, tree), selected(settings.where, tree), strict=True
    )
    chosen = [(str(KeyPath(path)), axes) for (path, _), axes, is_chosen in every if is_chosen]
    if chosen and all(axes is None for _, axes in chosen):
        raise ValueError(
            "axes is None for every parameter that where selects: "
            f"{_some([path for path, _ in chosen])}. Beside dimension numbers of optax.contrib, "
            "None means that a parameter is not projected"
        )
    shapes = [f"{KeyPath(p)} {jnp.shape(x)}" for p, x in named if 0 not in jnp.shape(x)]
    if shapes:
        raise ValueError(f"{fault}; received: {_some(shapes)}")


def _some(texts: Sequence[str]) -> str:
    return f"{', '.join(texts[:6])}{', ...' if len(texts) > 6 else ''}"


def _plan_leaf(
    settings: PlanSettings, path: KeyPath, shape: tuple[int, ...], axes: MatrixAxes
) -> LeafPlan | None:
    by_default = settings.where is hidden_matrices
    if isinstance(settings.rank, Sequence):
        return _plan_tucker(settings, path, shape, by_default)
    batch, modes = matrix_modes(path, shape, axes)
    if settings.rank is None:
        return LeafPlan(path, shape, batch, modes, (None, None))
    m, n = (math.prod(shape[a] for a in mode) for mode in modes)
    if by_default and min(m, n) <= settings.rank:
        return None
    rank = min(settings.rank, m, n)
    left, right = _projected_sides(settings.side, m, n)
    return LeafPlan(path, shape, batch, modes, (rank if left else None, rank if right else None))


def _check_dtype(path: KeyPath, leaf: Any) -> None:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"{path}: only real floating-point parameters can be projected, got {leaf.dtype} of "
            f"shape {leaf.shape}; leave it out through where"
        )
    check_bits(path, leaf.dtype)


def check_bits(path: KeyPath, dtype: Any) -> None:
    """Check for 16 bits or more: JAX does not promote narrower floats."""
    if jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{path}: only parameters of 16 bits or more can be projected or have a history, got "
            f"{jnp.dtype(dtype).name}: optimize a bfloat16 or float32 copy, or leave it out"
        )


def _plan_tucker(
    settings: PlanSettings, path: KeyPath, shape: tuple[int, ...], by_default: bool
) -> LeafPlan | None:
    ranks = tuple(settings.rank)  # type: ignore[arg-type]
    if len(shape) < len(ranks):
        if by_default:
            return None
        raise ValueError(
            f"{path}: rank={ranks} has one entry per mode of a tensor with more than two modes, "
            f"but the parameter has shape {shape}; a matrix takes one integer rank"
        )
    batch = tuple(range(len(shape) - len(ranks)))
    modes = tuple((a,) for a in range(len(batch), len(shape)))
    sizes = [shape[a] for (a,) in modes]
    columns = [math.prod(sizes) // max(size, 1) for size in sizes]
    clipped = tuple(min(entries) for entries in zip(ranks, sizes, columns, strict=True))
    return LeafPlan(path, shape, batch, modes, clipped)


def matrix_modes(
    path: KeyPath, shape: tuple[int, ...], axes: MatrixAxes
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The batch axes of a parameter, and the axes of its rows and columns."""
    ndim = len(shape)
    if ndim < 2:
        raise ValueError(f"{path}: a matrix needs at least two axes, got shape {shape}")
    named = sum(axes.sides, ())
    if any(not -ndim <= a < ndim for a in named):
        raise ValueError(f"{path}: {axes} is out of range for a parameter of shape {shape}")
    rows, cols = (tuple(a % ndim for a in side) for side in axes.sides)
    if set(rows) & set(cols) or len(set(rows + cols)) < len(named):
        raise ValueError(f"{path}: {axes} names an axis twice in a parameter of shape {shape}")
    return tuple(a for a in range(ndim) if a not in rows + cols), (rows, cols)


def _projected_sides(side: str, m: int, n: int) -> tuple[bool, bool]:
    """Whether the rows and whether the columns are projected; rows for a square matrix."""
    left = {
        "short": m <= n,
        "long": m >= n,
        "left": True,
        "right": False,
        "both": True,
    }[side]
    return left, not left or side == "both"
