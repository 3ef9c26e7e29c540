"""The backward pass of a model of stacked layers, to be run one part at a time.

A list of leaves is in the order of :class:`Parts`; one layer's leaves are (1, ...).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgalore_jax._src.low_bits.weights import read_weight
from natgalore_jax._src.per_layer.dependence import sources_of_outputs
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
    early: tuple[int, ...]  # parameters whose gradients are complete: those of the head alone
    late: tuple[int, ...]  # parameters of the embedding, tied ones included
    early_gradients: Leaves
    dx: Leaves  # the gradient by the output of the last layer
    # (index, one layer's leaves, dx) to their gradients and the dx of the layer before.
    layer: Callable[[jax.Array, Leaves, Leaves], tuple[Leaves, Leaves]]
    embed: Callable[[Leaves], Leaves]  # dx to the gradients of the late parameters


def start_backward(functions: Functions, parts: Parts, W: Sequence[Any], batch: Any) -> Backward:
    """Runs the model and keeps the input of every layer; what is inside a layer is recomputed.

    ``W`` are weights as they are stored; gradients are of what they stand for.
    """
    W = [
        w if i in parts.stacked else read_weight(to_device(w), x.dtype)
        for i, (w, x) in enumerate(zip(W, parts.shapes, strict=True))
    ]
    late = _reaching_embed(functions, parts, W, batch)
    early = tuple(i for i in parts.others if i not in late)
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


def _reaching_embed(
    functions: Functions, parts: Parts, W: Sequence[Any], batch: Any
) -> tuple[int, ...]:
    """The parameters that the input of the first layer depends on."""
    others = parts.others

    def embed(leaves, batch):
        leaves = dict(zip(others, leaves, strict=True))
        return _float_part(functions.embed(parts.without_stack(leaves), batch))

    leaves = [W[i] for i in others]
    jaxpr = jax.make_jaxpr(embed)(leaves, batch)
    unused = len(jaxpr.jaxpr.invars) - len(others)
    found = sources_of_outputs(jaxpr, [1 << i for i in others] + [0] * unused)
    return tuple(i for i in others if any(sources & (1 << i) for sources in found))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _float_part(x: Any) -> Leaves:
    """The leaves that have a gradient: masks, positions and random keys pass through."""
    return [leaf for leaf in jax.tree.leaves(x) if _is_float(leaf)]


def _with_floats(x: Any, floats: Leaves) -> Any:
    """x with other leaves that have a gradient."""
    leaves, treedef = jax.tree.flatten(x)
    new = iter(floats)
    return treedef.unflatten(next(new) if _is_float(leaf) else leaf for leaf in leaves)
