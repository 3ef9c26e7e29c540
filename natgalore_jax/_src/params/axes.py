"""Axes of a parameter that form its matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax

from natgalore_jax._src.params.checks import check_integer
from natgalore_jax._src.params.where import KeyPath, entry_per_leaf, is_function


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """The axes of a parameter that form the rows and the columns of its matrix.

    All other axes are batch axes: a parameter of shape ``(L, m, n)`` with
    ``MatrixAxes(rows=1, cols=2)`` is L independent m × n matrices. Several axes on one side are
    flattened: the query kernel of an attention layer, ``(embed, heads, head_dim)``, is an
    ``embed × (heads · head_dim)`` matrix with ``MatrixAxes(rows=0, cols=(1, 2))``.

    Wherever ``axes`` takes a ``MatrixAxes``, it takes Optax's
    ``optax.contrib.MuonDimensionNumbers`` and ``optax.contrib.GaLoreDimensionNumbers`` too, with
    ``reduction_axis`` as rows and ``output_axis`` as columns. In a tree with dimension numbers None
    means as in Optax that a parameter is not projected; in a tree without, the default axes.

    Args:
      rows: one axis or several; negative axes count from the end.
      cols: one axis or several, none of them in ``rows``.

    Raises:
      TypeError: if an axis is not an integer.
      ValueError: if a side has no axis or an axis is named twice. Axes out of range are an error of
        ``init``, with the path of the parameter.

    Example:
      >>> import natgalore_jax as ng
      >>> ng.MatrixAxes(rows=0, cols=(1, 2))
      MatrixAxes(rows=(0,), cols=(1, 2))

      >>> import jax.numpy as jnp, optax
      >>> axes = {"query": optax.contrib.MuonDimensionNumbers(0, (1, 2)), "skip": None}
      >>> tx = ng.galore_adamw(1e-2, rank=2, axes=axes)
      >>> state = tx.init({"query": jnp.ones((8, 3, 4)), "skip": jnp.ones((8, 8))})
      >>> {name: mu.shape for name, mu in optax.tree.get(state, "mu").items()}
      {'query': (2, 3, 4), 'skip': (8, 8)}
    """

    rows: int | tuple[int, ...]
    cols: int | tuple[int, ...]

    def __post_init__(self) -> None:
        for side in ("rows", "cols"):
            axes = getattr(self, side)
            axes = tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
            if not axes:
                raise ValueError(f"MatrixAxes needs at least one axis for {side}, got none")
            for axis in axes:
                check_integer(f"MatrixAxes {side}", axis, minimum=-(2**31))
            object.__setattr__(self, side, axes)
        rows, cols = self.sides
        if len(set(rows + cols)) < len(rows + cols):
            raise ValueError(f"MatrixAxes names an axis twice: {rows=}, {cols=}")

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes of the rows and axes of the columns."""
        return cast(Any, (self.rows, self.cols))


AxesLike = MatrixAxes | None | Any | Callable[[Any], Any]

DEFAULT = MatrixAxes(rows=-2, cols=-1)


def _is_dimension_numbers(x: Any) -> bool:
    """By fields and not by type: optax.contrib has several types, and may move them."""
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def _is_axes(x: Any) -> bool:
    return x is None or isinstance(x, MatrixAxes) or _is_dimension_numbers(x)


def axes_per_leaf(axes: AxesLike, tree: Any) -> list[MatrixAxes | None]:
    """One entry per leaf of ``tree`` from any form of ``axes``; None for no matrix."""
    if is_function(axes):
        axes = axes(tree)
    # Read from the whole argument: optax.masked may hide all that have dimension numbers.
    as_in_optax = any(
        _is_dimension_numbers(x) for x in jax.tree.leaves(axes, is_leaf=_is_dimension_numbers)
    )
    entries = entry_per_leaf("axes", axes, tree, _is_axes)
    paths = [KeyPath(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [
        (None if as_in_optax else DEFAULT) if entry is None else _matrix_axes(path, entry)
        for path, entry in zip(paths, entries, strict=True)
    ]


def _matrix_axes(path: KeyPath, entry: Any) -> MatrixAxes:
    if isinstance(entry, MatrixAxes):
        return entry
    if not _is_dimension_numbers(entry):
        raise TypeError(
            f"{path}: axes must be MatrixAxes, dimension numbers of optax.contrib, or None, got "
            f"{entry!r}"
        )
    try:
        return MatrixAxes(rows=entry.reduction_axis, cols=entry.output_axis)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {entry} is no matrix: {error}") from error
