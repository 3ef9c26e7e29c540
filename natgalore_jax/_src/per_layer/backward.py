"""Backward pass of a model of stacked layers, one part at a time.

Lists of leaves are in the order of :class:`Parts`; leaves of one layer are (1, ...).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgalore_jax._src.low_bits.weights import read_weight
from natgalore_jax._src.params.dependence import sources_of_outputs
from natgalore_jax._src.per_layer.layer_parts import Parts
from natgalore_jax._src.training.offload import to_device

Leaves = list[jax.Array]


class Functions(NamedTuple):
    """The user's model; see :func:`.per_layer`."""

    embed: Callable[[Any, Any], Any]
    layer: Callable[[Any, Any], Any]
    head: Callable[[Any, Any, Any], jax.Array]


class Backward(NamedTuple):
    """State of the backward pass after the forward pass and the head's backward pass."""

    loss: jax.Array
    early: tuple[int, ...]  # parameters of the head alone, whose gradients are complete
    late: tuple[int, ...]  # parameters of the embedding, tied parameters included
    early_gradients: Leaves
    dx: Leaves  # gradient with respect to the output of the last layer
    # (index, leaves of one layer, dx) -> (gradients of the leaves, dx of the previous layer)
    layer: Callable[[jax.Array, Leaves, Leaves], tuple[Leaves, Leaves]]
    embed: Callable[[Leaves], Leaves]  # dx -> gradients of the late parameters


def start_backward(functions: Functions, parts: Parts, W: Sequence[Any], batch: Any) -> Backward:
    """Run the model and the head's backward pass, with the inputs of layers as checkpoints.

    ``W`` are stored weights; gradients are with respect to the decoded weights.
    """
    W = [
        w if i in parts.stacked else read_weight(to_device(w), x.dtype)
        for i, (w, x) in enumerate(zip(W, parts.shapes, strict=True))
    ]
    late = _used_by_embed(functions, parts, W, batch)
    early = tuple(i for i in parts.unstacked if i not in late)
    early_W, late_W, stack = ([W[i] for i in part] for part in (early, late, parts.stacked))

    def embed(late_W):
        leaves = dict(zip((*early, *late), (*early_W, *late_W), strict=True))
        x = functions.embed(parts.without_stack(leaves), batch)
        return _float_part(x), x

    def layer(w, x):
        return functions.layer(parts.stack_treedef.unflatten(w), x)

    def head(early_W, late_W, floats):
        leaves = dict(zip((*early, *late), (*early_W, *late_W), strict=True))
        return functions.head(parts.without_stack(leaves), _with_floats(last, floats), batch)

    _, embed_vjp, x = jax.vjp(embed, late_W, has_aux=True)
    dtypes = [parts.shapes[i].dtype for i in parts.stacked]

    def forward(x, stored):
        w = [read_weight(a, t) for a, t in zip(to_device(stored), dtypes, strict=True)]
        return layer(w, x), x

    last, inputs = jax.lax.scan(forward, x, stack)
    loss, head_vjp = jax.vjp(head, early_W, late_W, _float_part(last))
    if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"head must return a scalar loss, got {loss.dtype} of shape {loss.shape}")
    early_G, late_G, dx = head_vjp(jnp.ones_like(loss))

    def layer_backward(index, w, dx):
        x = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, 0, False), inputs)

        def output(w, floats):
            return _float_part(layer([a[0] for a in w], _with_floats(x, floats)))

        _, vjp = jax.vjp(output, w, _float_part(x))
        return vjp(dx)

    def embed_backward(dx):
        (G,) = embed_vjp(dx)
        return [a + b for a, b in zip(late_G, G, strict=True)]

    return Backward(loss, early, late, early_G, dx, layer_backward, embed_backward)


def _used_by_embed(
    functions: Functions, parts: Parts, W: Sequence[Any], batch: Any
) -> tuple[int, ...]:
    """Parameters on which the input of the first layer depends."""
    numbers = parts.unstacked

    def embed(leaves, batch):
        leaves = dict(zip(numbers, leaves, strict=True))
        return _float_part(functions.embed(parts.without_stack(leaves), batch))

    leaves = [W[i] for i in numbers]
    jaxpr = jax.make_jaxpr(embed)(leaves, batch).jaxpr
    batch_leaves = len(jaxpr.invars) - len(numbers)
    found = sources_of_outputs(jaxpr, [1 << i for i in numbers] + [0] * batch_leaves)
    return tuple(i for i in numbers if any(sources & (1 << i) for sources in found))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _float_part(x: Any) -> Leaves:
    """Leaves with a gradient, without masks, positions and random keys."""
    return [leaf for leaf in jax.tree.leaves(x) if _is_float(leaf)]


def _with_floats(x: Any, floats: Leaves) -> Any:
    """Replace the leaves of x that have a gradient."""
    leaves, treedef = jax.tree.flatten(x)
    new = iter(floats)
    return treedef.unflatten(next(new) if _is_float(leaf) else leaf for leaf in leaves)
