"""Weights in 8 bits with stochastic rounding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgalore_jax._src.kernels.dither import STRIDES, dither
from natgalore_jax._src.kernels.float8_blocks import (
    Blocks,
    block_max,
    blocks_between,
    blocks_of,
    broadcast_blocks,
)
from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.linear_codes import (
    LinearCodes,
    Stored,
    decode,
    leaves_of,
    normal_scales,
    tree_of,
)
from natgalore_jax._src.params.checks import check_float_dtype, check_integer
from natgalore_jax._src.params.where import KeyPath, Where, hidden_matrices, selected

_LARGEST = np.float32(127)
# A new scale leaves room for the largest weight of its block to grow by a sixteenth.
_ROOM = np.float32(1 + 1 / 16)


class QuantizedWeights(NamedTuple):
    """Parameters, some of them in 8 bits, from :func:`.quantize_weights`."""

    count: jax.typing.ArrayLike  #: shape (), int32: number of roundings
    #: The tree of parameters: int8 where scales has an array, elsewhere the parameter itself.
    codes: Any
    #: The tree of parameters: bfloat16 in the shape of the parameter, except that one axis has an
    #: entry for each block; MaskedNode where the parameter is not in 8 bits.
    scales: Any


@own_arithmetic
def quantize_weights(
    params: Any, where: Where = hidden_matrices, block_size: int = 256
) -> QuantizedWeights:
    r"""Store weights in 8 bits, with a scale for each block: 1.01 bytes a number.

    A weight is :math:`w = s c` with an integer c from −127 to 127, rounded to nearest, and a
    bfloat16 scale s for each block of up to ``block_size`` weights along one of the last two axes.
    :func:`.per_layer` trains such weights: it decodes one layer at a time and rounds updated
    weights stochastically, so that the mean is exact. An update of a hundredth of s moves one
    weight in a hundred, whereas rounding to nearest would lose it.

    A new scale would round weights that have no update. Therefore s is kept as long as the largest
    weight of the block is between 127/2 and 127 times s, and a new scale is a sixteenth larger than
    necessary: nothing is clipped, and the scale changes only after the largest weight has grown by
    a sixteenth or halved.

    Args:
      params: any tree of arrays.
      where: the weights that are stored in 8 bits: a callable ``(path, leaf) -> bool``, a pytree of
        booleans, or the default :func:`.hidden_matrices`.
      block_size: the largest number of weights that share a scale, at least 16.

    Returns:
      A :class:`.QuantizedWeights`, a pytree of plain arrays that checkpoints can store.

    Raises:
      TypeError, ValueError: for an argument of a wrong type or value, and, with its path, for a
        selected parameter that is not floating-point or has no axis.

    References:
      Zhang et al., Q-GaLore (2024): weights in 8 bits with stochastic rounding and projected
      gradients, with a new scale for each block at each step.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as ng
      >>> params = {"layers": {"w": jax.random.normal(jax.random.key(0), (2, 64, 512))}}
      >>> weights = ng.training.quantize_weights(params)
      >>> weights.codes["layers"]["w"].dtype, weights.scales["layers"]["w"].shape
      (dtype('int8'), (2, 1, 512))
      >>> decoded = ng.training.dequantize_weights(weights)
      >>> bool(jnp.max(jnp.abs(decoded["layers"]["w"] - params["layers"]["w"])) < 0.02)
      True
    """
    check_integer("block_size", block_size, minimum=16)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    stored = [
        _nearest(KeyPath(path), leaf, block_size) if chosen and jnp.size(leaf) else leaf
        for (path, leaf), chosen in zip(leaves, selected(where, params), strict=True)
    ]
    codes, scales = tree_of(treedef, stored, is_coded=True)
    return QuantizedWeights(jnp.zeros([], jnp.int32), codes, scales)


@own_arithmetic
def dequantize_weights(weights: QuantizedWeights, dtype: Any = jnp.float32) -> Any:
    """Decode parameters in 8 bits.

    Args:
      weights: from :func:`.quantize_weights` or a step of :func:`.per_layer`.
      dtype: of the decoded parameters; float32 is exact.

    Returns:
      The tree of parameters; those not in 8 bits are unchanged.

    Raises:
      TypeError: for anything else than such weights, and a dtype that is not a float.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> weights = ng.training.quantize_weights({"w": jnp.ones((64, 64)), "scale": jnp.ones(64)})
      >>> ng.training.dequantize_weights(weights, jnp.bfloat16)["w"].dtype
      dtype(bfloat16)
    """
    if not isinstance(weights, QuantizedWeights):
        raise TypeError(f"dequantize_weights takes QuantizedWeights, got {type(weights).__name__}")
    check_float_dtype("dtype", dtype)
    return decoded(weights, dtype)


def weight_leaves(params: Any) -> tuple[Any, list[Stored]]:
    """Structure of a tree of parameters, and its stored leaves."""
    if not isinstance(params, QuantizedWeights):
        leaves, treedef = jax.tree.flatten(params)
        return treedef, leaves
    treedef = jax.tree.structure(params.codes)
    return treedef, leaves_of(treedef.flatten_up_to, LinearCodes(params.codes, params.scales))


def decoded(params: Any, dtype: Any) -> Any:
    """The tree of parameters with 8-bit leaves decoded in this dtype, None for float32."""
    treedef, leaves = weight_leaves(params)
    return treedef.unflatten(read_weight(w, dtype or jnp.float32) for w in leaves)


def with_weight_leaves(params: Any, leaves: list[Stored]) -> Any:
    """The tree of parameters with new leaves after an update."""
    treedef, _ = weight_leaves(params)
    if not isinstance(params, QuantizedWeights):
        return treedef.unflatten(leaves)
    codes, scales = tree_of(treedef, leaves, is_coded=True)
    return QuantizedWeights(optax.safe_increment(params.count), codes, scales)


@own_arithmetic
def read_weight(stored: Stored, dtype: Any) -> jax.Array:
    """Decode a weight in this dtype; arrays pass through."""
    if not isinstance(stored, LinearCodes):
        return stored
    return decode(stored, stored.codes.shape, dtype)


@own_arithmetic
def write_weight(
    x: jax.Array,
    old: Stored,
    count: jax.typing.ArrayLike,
    salt: int,
    layer: jax.typing.ArrayLike = 0,
) -> Stored:
    """Store a weight as ``old`` is stored, with stochastic rounding.

    Args:
      x: the new weight, float32 if it is stored in 8 bits.
      old: the stored weight before the update.
      count: different at each update.
      salt: different for each parameter.
      layer: index of the first layer in x.
    """
    if not isinstance(old, LinearCodes):
        return x
    peak = block_max(x, blocks_between(x.shape, old.scales.shape))
    scales = old.scales.astype(jnp.float32)
    stays = (peak <= _LARGEST * scales) & (peak >= _LARGEST / 2 * scales)
    scales = jnp.where(stays, scales, _new_scales(peak))
    ratio = _ratio(x, scales)
    below = jnp.floor(ratio)
    noise = dither(x.shape, count, salt, STRIDES[0], first=layer) >> 8
    up = noise.astype(jnp.int32).astype(jnp.float32) * np.float32(2.0**-24) < ratio - below
    codes = below + up.astype(jnp.float32)
    return LinearCodes(codes.astype(jnp.int8), scales.astype(jnp.bfloat16))


def _nearest(path: KeyPath, leaf: Any, block_size: int) -> LinearCodes:
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.ndim:
        raise TypeError(
            f"{path}: only floating-point parameters with an axis can be stored in 8 bits, got "
            f"{leaf.dtype} of shape {tuple(leaf.shape)}; leave it out through where"
        )
    x = leaf.astype(jnp.float32)
    blocks: Blocks = blocks_of(x.shape, block_size, max(x.ndim - 2, 0))
    scales = _new_scales(block_max(x, blocks))
    codes = jnp.round(_ratio(x, scales)).astype(jnp.int8)
    return LinearCodes(codes, scales.astype(jnp.bfloat16))


def _new_scales(peak: jax.Array) -> jax.Array:
    """Scales for blocks with these largest numbers, float32 with bfloat16's precision."""
    return normal_scales((peak * (_ROOM / _LARGEST)).astype(jnp.bfloat16).astype(jnp.float32))


def _ratio(x: jax.Array, scales: jax.Array) -> jax.Array:
    s = broadcast_blocks(scales, x.shape)
    return jnp.where(s > 0, x / jnp.where(s > 0, s, 1.0), 0.0)
