"""Split of the parameters into a stack of layers and unstacked parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from natgalore_jax._src.kernels.linear_codes import LinearCodes
from natgalore_jax._src.low_bits.weights import QuantizedWeights, decoded, weight_leaves
from natgalore_jax._src.params.checks import check_unused
from natgalore_jax._src.params.where import KeyPath
from natgalore_jax._src.training.offload import stored_like, to_device

Selector = str | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Leaves of a tree of parameters that belong to the stack, by number."""

    treedef: Any
    paths: tuple[KeyPath, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    stack_treedef: Any  # of the subtree of stacked parameters
    stacked: tuple[int, ...]  # in the order of its leaves
    length: int  # L

    @property
    def unstacked(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.paths)) if i not in self.stacked)

    @property
    def of_one_layer(self) -> list[jax.ShapeDtypeStruct]:
        return self.with_length(1)

    def with_length(self, length: int) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the parameters of a model with ``length`` layers."""
        return [
            with_length(x, 0 if i in self.stacked else None, length)
            for i, x in enumerate(self.shapes)
        ]

    def without_stack(self, leaves: Mapping[int, Any]) -> Any:
        """The tree of parameters with shapes instead of the stacked parameters."""
        return self.treedef.unflatten(leaves.get(i, x) for i, x in enumerate(self.shapes))


def split_params(params: Any, layers: Selector, weight_dtype: Any = None) -> Parts:
    """Find the stack and the number of its layers.

    Args:
      params: the parameters.
      layers: selector of the stack.
      weight_dtype: dtype of decoded 8-bit parameters, None for float32.

    Raises:
      ValueError: if there is no stack, its leaves do not have the same number of layers, layers
        share the scales of 8-bit parameters, or ``weight_dtype`` has no effect.
    """
    _, stored = weight_leaves(params)
    if not isinstance(params, QuantizedWeights):
        check_unused("weight_dtype", weight_dtype, None, "on parameters that are not in 8 bits")
    else:
        params = jax.eval_shape(lambda p: decoded(p, weight_dtype), params)
    entries, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(KeyPath(path) for path, _ in entries)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in entries)
    numbers = treedef.unflatten(range(len(paths)))
    try:
        stack = _select(numbers, layers)
    except (KeyError, AttributeError, TypeError) as error:
        known = ", ".join(map(str, paths[:6]))
        raise ValueError(
            f"layers={layers!r} selects nothing from the parameters: {known}, ..."
        ) from error
    stacked, stack_treedef = jax.tree.flatten(stack)
    if not stacked:
        raise ValueError(f"layers={layers!r} selects a part of the parameters without any leaves")
    lengths = {shapes[i].shape[:1] for i in stacked}
    if len(lengths) > 1 or () in lengths:
        received = ", ".join(f"{paths[i]} {shapes[i].shape}" for i in stacked)
        raise ValueError(
            "every parameter of the layers needs a leading axis of the same length, one entry for "
            f"each layer; received {received}"
        )
    ((length,),) = lengths
    for i in stacked:
        if isinstance(stored[i], LinearCodes) and stored[i].scales.shape[0] != length:
            raise ValueError(
                f"{paths[i]}: layers share the scales of this 8-bit parameter of shape "
                f"{shapes[i].shape}; leave it out through where of quantize_weights"
            )
    return Parts(treedef, paths, shapes, stack_treedef, tuple(stacked), length)


def _select(tree: Any, layers: Selector) -> Any:
    if callable(layers):
        return layers(tree)
    return tree[layers] if isinstance(tree, Mapping) else getattr(tree, layers)


def take_layer(tree: Any, index: jax.Array, axis: int = 0) -> Any:
    """One layer, with a layer axis of length one, in device memory."""
    return to_device(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis), tree))


def put_layer(tree: Any, value: Any, index: jax.Array, axis: int = 0) -> Any:
    """Replace one layer of a tree, in host or device memory."""

    def put(x, value):
        value = stored_like(value.astype(x.dtype), x)
        if jax.typeof(value).sharding.mesh.empty:
            # XLA on GPUs may transpose whole stacks for a product in the loop over the layers: fix
            # the layout. Not for sharded values, which the constraint would gather.
            value = with_layout_constraint(value, Layout(tuple(range(value.ndim))))
        return jax.lax.dynamic_update_slice_in_dim(x, value, index, axis)

    return jax.tree.map(put, tree, value)


def with_length(x: jax.ShapeDtypeStruct, axis: int | None, length: int) -> jax.ShapeDtypeStruct:
    """The shape of x with ``length`` layers along ``axis``, if it has a layer axis."""
    if axis is None:
        return x
    shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    return jax.ShapeDtypeStruct(shape, x.dtype)
