"""Axes of a parameter that form its matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

from natgalore_jax._src.params.checks import check_integer
from natgalore_jax._src.params.where import entry_per_leaf


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """The axes of a parameter that form the rows and the columns of its matrix.

    All other axes are batch axes: a parameter of shape ``(L, m, n)`` with
    ``MatrixAxes(rows=1, cols=2)`` is L independent m × n matrices. Several axes on one side are
    flattened: the query kernel of an attention layer, ``(embed, heads, head_dim)``, is an
    ``embed × (heads · head_dim)`` matrix with ``MatrixAxes(rows=0, cols=(1, 2))``.

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


def _is_axes(x: Any) -> bool:
    return x is None or isinstance(x, MatrixAxes)


def axes_per_leaf(axes: AxesLike, tree: Any) -> list[MatrixAxes | None]:
    """One entry per leaf of ``tree`` from any form of ``axes``; None is the default."""
    if callable(axes):
        axes = axes(tree)
    entries = entry_per_leaf("axes", axes, tree, _is_axes)
    for entry in entries:
        if not _is_axes(entry):
            raise TypeError(f"axes must be MatrixAxes or None at every parameter, got {entry!r}")
    return entries
