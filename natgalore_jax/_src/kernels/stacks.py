"""Small equal parameters are computed as one stack.

XLA's compile time grows with the number of operations, and a small matrix is computed in less time
than its operations take to start. Stacks are temporary: a state has one array per parameter.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.kernel import kernel
from natgalore_jax._src.params.context import is_layer_view

# Bytes of the largest arrays of a stack: all are live at once, and stacks of 4 MiB made updates of
# 512 x 512 matrices a third slower than one by one.
MAX_BYTES = 2**19
# Stacks of arrays up to this size have four times as many bytes, because each stack adds up to half
# a second of compile time.
SMALL_BYTES = 2**13


def for_each(
    function: Callable[[Any, Any, Any], Any],
    settings: Sequence[Hashable],
    columns: Sequence[Sequence[Any]],
    shared: Any,
    *,
    one_by_one: bool = False,
) -> list[Any]:
    """``function(settings, operands, shared)`` of every parameter; small equal ones in a stack.

    Args:
      function: of one parameter, defined at the top level of a module.
      settings: one entry for each parameter, None where there is nothing to compute.
      columns: the operands, a pytree of arrays for each parameter in each column.
      shared: a pytree of numbers and arrays.
      one_by_one: loop over a stack, for a function with a ``cond``, which vectorisation would turn
        into both branches.

    Returns:
      One result for each parameter, None where there is nothing to compute.
    """
    operands = [*zip(*columns, strict=True)]
    results: list[Any] = [None] * len(settings)
    # Updates of one layer do not depend on the parameters of others, and XLA removes the latter's.
    alone = [[i] for i, own in enumerate(settings) if own is not None]
    for numbers in alone if is_layer_view() else kinds(settings, operands):
        own = [operands[i] for i in numbers]
        found = _of_kind(function, settings[numbers[0]], one_by_one, own, shared)
        for i, result in zip(numbers, found, strict=True):
            results[i] = result
    return results


def merged(found: Sequence[Any], *columns: Sequence[Any]) -> list[list[Any]]:
    """Results of :func:`for_each` by field; those of ``columns`` where nothing was computed."""
    return [
        [last if new is None else new[field] for new, last in zip(found, column, strict=True)]
        for field, column in enumerate(columns)
    ]


@kernel("function", "settings", "one_by_one")
def _of_kind(function, settings, one_by_one, operands, shared):
    def of_one(own):
        return function(settings, own, shared)

    if len(operands) == 1:
        return [of_one(operands[0])]
    of_stack = functools.partial(jax.lax.map, of_one) if one_by_one else jax.vmap(of_one)
    return unstack(of_stack(stack(operands)), len(operands))


def most_in_stack(tree: Any) -> int:
    """Largest number of parameters with such arrays in a stack."""
    largest = max(1, *map(bytes_of, jax.tree.leaves(tree)))
    return max(1, (4 if largest <= SMALL_BYTES else 1) * MAX_BYTES // largest)


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kinds(
    settings: Sequence[Hashable],
    operands: Sequence[Any],
    most: Callable[[Any], int] = most_in_stack,
) -> list[list[int]]:
    """Numbers of the parameters of each stack, those without settings left out.

    ``most`` of the operands of a parameter is the largest length.
    """
    equal: dict[Hashable, list[int]] = defaultdict(list)
    for i, (own, tree) in enumerate(zip(settings, operands, strict=True)):
        if own is not None:
            arrays, treedef = jax.tree.flatten(tree)
            equal[own, treedef, *map(jax.typeof, arrays)].append(i)
    return [
        numbers[start : start + length]
        for numbers in equal.values()
        for length in [most(operands[numbers[0]])]
        for start in range(0, len(numbers), length)
    ]


def stack(trees: Sequence[Any]) -> Any:
    """Trees of equal arrays as one tree, with a new first axis."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def unstack(stacked: Any, length: int) -> list[Any]:
    """The inverse of :func:`stack`.

    Args:
      stacked: a tree of arrays.
      length: of the first axis.
    """
    if length == 1:
        return [jax.tree.map(lambda x: x.squeeze(0), stacked)]
    numbers = range(length)
    # Constant indices would make a kernel of 25 ms compile time of every slice; indices that depend
    # on a branch are data, so that all equal slices are one kernel.
    indices = jax.lax.cond(
        jax.lax.optimization_barrier(jnp.bool_(False)),
        lambda: tuple(jnp.uint32(0) for _ in numbers),
        lambda: tuple(jnp.uint32(i) for i in numbers),
    )
    return [jax.tree.map(lambda x, i=i: _entry(x, i), stacked) for i in indices]


def _entry(x: jax.Array, index: jax.Array) -> jax.Array:
    starts = (index, *([jnp.uint32(0)] * (x.ndim - 1)))
    return jax.lax.dynamic_slice(x, starts, (1, *x.shape[1:])).squeeze(0)
