"""Small equal parameters are computed as one stack.

XLA's compile time grows with the number of operations, and a small matrix is computed in less time
than its operations take to start. Stacks are temporary: a state has one array per parameter. Where
only the gradients of parameters are too large for a stack, everything else is computed as one, and
the gradients are read one by one.

A function of one parameter is ``function(settings, operands, shared)``: ``settings`` is static and
hashable, ``operands`` are the parameter's own arrays and have a new first axis in a stack,
``shared`` is one for all. Parameters with equal settings and operands of equal types form a stack.
Function and settings are the key of a compiled program, so the function is defined at the top level
of a module.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.kernels.kernel import kernel
from natgalore_jax._src.params.context import is_layer_view
from natgalore_jax._src.params.placement import has_explicit_sharding

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
      function: of one parameter.
      settings: one entry for each parameter, None where there is nothing to compute.
      columns: the operands, a pytree of arrays for each parameter in each column.
      shared: a pytree of numbers and arrays.
      one_by_one: loop over a stack, for a function with a ``cond``, which vectorisation would turn
        into both branches.

    Returns:
      One result for each parameter, None where there is nothing to compute.
    """
    of_kind = functools.partial(_of_stack, function, one_by_one)
    return _for_each_kind(of_kind, settings, [*zip(*columns, strict=True)], shared, most_in_stack)


def merged(found: Sequence[Any], *columns: Sequence[Any]) -> list[list[Any]]:
    """Results of :func:`for_each` by field; those of ``columns`` where nothing was computed."""
    return [
        [last if new is None else new[field] for new, last in zip(found, column, strict=True)]
        for field, column in enumerate(columns)
    ]


def for_each_gradient(
    function: Callable[[Any, Any, Any, Any], Any],
    finish: Callable[[Any, Any, Any, Any, Any], Any],
    settings: Sequence[Hashable],
    columns: Sequence[Sequence[Any]],
    gradients: Sequence[jax.Array],
    shared: Any,
) -> list[Any]:
    """:func:`for_each` in two parts, of which only ``finish`` has results of the gradient's size.

    Of equal parameters whose gradients are too large for a stack, the first part is computed in
    stacks.

    Args:
      function: ``found = function(settings, operands, G, shared)``; it takes G by :func:`read`.
      finish: ``finish(settings, operands, found, G, shared)``.
      settings, columns, shared: as in :func:`for_each`, without the gradients.
      gradients: one for each parameter.
    """

    def most(own):
        with_gradient = most_in_stack(own)
        can_be_apart = with_gradient == 1 and not has_explicit_sharding(own[-1])
        return most_in_stack(own[:-1]) if can_be_apart else with_gradient

    def of_kind(settings, operands, shared):
        are_apart = len(operands) > most_in_stack(operands[0])
        return _of_gradients(function, finish, are_apart, settings, operands, shared)

    operands = [*zip(*columns, gradients, strict=True)]
    return _for_each_kind(of_kind, settings, operands, shared, most)


class Apart(NamedTuple):
    """Gradients of the parameters of a stack, which are no stack themselves."""

    gradients: Sequence[jax.Array]
    number: jax.Array  # of a parameter in the stack


def read(
    function: Callable[..., jax.Array], G: jax.Array | Apart, *vectors: jax.Array
) -> jax.Array:
    """``function(G, *vectors)``, a small array, inside of :func:`for_each_gradient`."""
    if not isinstance(G, Apart):
        return function(G, *vectors)
    gradients = G.gradients

    @jax.custom_batching.custom_vmap
    def of_one(number, *vectors):
        del number
        return function(gradients[0], *vectors)

    @of_one.def_vmap
    def of_all(size, is_stack, number, *vectors):
        del number
        own = [
            unstack(x, size) if stacked else [x] * size
            for x, stacked in zip(vectors, is_stack[1:], strict=True)
        ]
        found = [function(*each) for each in zip(gradients, *own, strict=True)]
        return stack(found), True

    return of_one(G.number, *vectors)


def any_of(G: jax.Array | Apart) -> jax.Array:
    """A gradient with the type of G."""
    return G.gradients[0] if isinstance(G, Apart) else G


def _for_each_kind(of_kind, settings, operands, shared, most) -> list[Any]:
    """``of_kind(settings, operands, shared)`` of the parameters of each stack."""
    results: list[Any] = [None] * len(settings)
    # Updates of one layer do not depend on the parameters of others, and XLA removes the latter's.
    alone = [[i] for i, own in enumerate(settings) if own is not None]
    for numbers in alone if is_layer_view() else kinds(settings, operands, most):
        found = of_kind(settings[numbers[0]], [operands[i] for i in numbers], shared)
        for i, result in zip(numbers, found, strict=True):
            results[i] = result
    return results


@kernel("function", "one_by_one", "settings")
def _of_stack(function, one_by_one, settings, operands, shared):
    def of_one(own):
        return function(settings, own, shared)

    return _in_stack(of_one, operands, one_by_one)


@kernel("function", "finish", "are_apart", "settings")
def _of_gradients(function, finish, are_apart, settings, operands, shared):
    def of_one(own):
        *own, G = own
        return finish(settings, own, function(settings, own, G, shared), G, shared)

    if not are_apart:
        return _in_stack(of_one, operands)
    small, gradients = [own[:-1] for own in operands], [own[-1] for own in operands]
    length = len(operands)
    found = jax.vmap(lambda i, own: function(settings, own, Apart(gradients, i), shared))(
        jnp.arange(length, dtype=jnp.int32), stack(small)
    )
    each = zip(small, unstack(found, length), gradients, strict=True)
    return [finish(settings, *one, shared) for one in each]


def _in_stack(of_one, operands, one_by_one=False):
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

    ``most`` of the operands of a parameter is the largest length. XLA compiles equal kernels once:
    stacks of one length, if one from half of the largest divides the number of parameters.
    """
    equal: dict[Hashable, list[int]] = defaultdict(list)
    for i, (own, tree) in enumerate(zip(settings, operands, strict=True)):
        if own is not None:
            arrays, treedef = jax.tree.flatten(tree)
            equal[own, treedef, *map(jax.typeof, arrays)].append(i)
    return [
        numbers[start : start + length]
        for numbers in equal.values()
        for length in [_length(len(numbers), most(operands[numbers[0]]))]
        for start in range(0, len(numbers), length)
    ]


def _length(number: int, most: int) -> int:
    most = min(number, most)
    return next((x for x in range(most, most // 2, -1) if number % x == 0), most)


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
    # Constant indices would make a kernel of 25 ms compile time of every slice; indices that depend
    # on a branch are data, so that all equal slices are one kernel. The stack depends on it too, or
    # every slice would be a kernel of all that the stack is made of.
    indices, stacked = jax.lax.cond(
        jax.lax.optimization_barrier(jnp.bool_(False)),
        lambda x: ((np.uint32(0),) * length, jax.tree.map(jnp.zeros_like, x)),
        lambda x: (tuple(map(np.uint32, range(length))), x),
        stacked,
    )
    return [jax.tree.map(lambda x, i=i: _entry(x, i), stacked) for i in indices]


def _entry(x: jax.Array, index: jax.Array) -> jax.Array:
    starts = (index, *([np.uint32(0)] * (x.ndim - 1)))
    return jax.lax.squeeze(jax.lax.dynamic_slice(x, starts, (1, *x.shape[1:])), (0,))
