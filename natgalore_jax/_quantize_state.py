"""Any optimizer with its large moments in eight bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._check_tree import update_dtypes
from natgalore_jax._companions import SECOND_MOMENTS, entries_of
from natgalore_jax._dither import STRIDES, dither
from natgalore_jax._kernel import kernel, own_arithmetic
from natgalore_jax._quantize import (
    block_max,
    block_sum,
    blocks_between,
    blocks_of,
    decode,
    encode,
)
from natgalore_jax._scope import current_subspace
from natgalore_jax._validate import check_integer
from natgalore_jax._where import KeyPath, Where, selected, shape_and_dtype


class QuantizedState(NamedTuple):
    """State of :func:`quantize_state` and :func:`scale_by_adam_8bit`."""

    count: jax.typing.ArrayLike  #: shape (), int32: steps taken
    #: The state of the inner optimizer. Where scales has an array: uint8, shape of the parameter.
    codes: Any
    #: A tree of the same structure: float32, a bound on the absolute values of each block, shape of
    #: the parameter but for the axis that is divided; MaskedNode where nothing is in 8 bits.
    scales: Any


class EightBits(NamedTuple):
    """The arguments that decide what is stored in 8 bits."""

    block_size: int
    min_size: int
    where: Where

    def check(self) -> None:
        check_integer("block_size", self.block_size, minimum=32)
        check_integer("min_size", self.min_size, minimum=1)

    def batch_of_leaves(self, params: Any) -> list[int | None]:
        """For each parameter whose moments are stored in 8 bits the number of its batch axes."""
        plans = current_subspace() or {}
        out: list[int | None] = []
        leaves = jax.tree_util.tree_leaves_with_path(params)
        for (path, leaf), chosen in zip(leaves, selected(self.where, params), strict=True):
            leaf = shape_and_dtype(path, leaf)
            is_large = leaf.size >= self.min_size and jnp.issubdtype(leaf.dtype, jnp.floating)
            plan = plans.get(str(KeyPath(path)))
            out.append((len(plan.batch) if plan else 0) if chosen and is_large else None)
        return out


def quantize_state(
    inner: optax.GradientTransformation,
    block_size: int = 256,
    min_size: int = 4096,
    where: Where = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Stores the moments of an optimizer in 8 bits, a quarter of their memory in float32.

    Every floating-point array of the inner state that has the shape of its parameter is stored as
    one byte a number and a float32 for each block; the inner optimizer works on float32 arrays
    that exist only during its step. Everything else (counts, factored statistics, Fisher matrices,
    gradient histories, moments of small parameters) stays as it is. With B the largest absolute
    value of a block and :math:`c = 2^{-K}` times the power of two above it, x is stored as

    .. math:: \operatorname{sign}(x) \cdot \mathrm{fl}_4(|x| + c),

    a float with four bits of mantissa: the error of a number is at most a sixteenth of
    :math:`|x| + c`. First moments have a sign and K = 8; second moments, recognised by the names
    of Optax's fields, none and K = 16, so that their roots cover the same range. A second moment
    is never read as zero, so that no update blows up. Rounding is dithered: right on average over
    the steps, or a second moment, which changes by a thousandth a step, would stand still.

    Inside a subspace the moments follow the basis as float32 ones do, one layer at a time. For Adam
    :func:`scale_by_adam_8bit` is faster and needs no float32 moments even then: at the full size of
    a model the wrapper's step has taken four times that of float32 Adam on a CPU. Do not wrap an
    optimizer that keeps weights in its state (schedule-free, lookahead).

    Args:
      inner: any transformation that ``optax.tree.map_params`` understands.
      block_size: the most numbers that share a bound, at least 32. Blocks run along the shorter of
        the last two axes (if it has 64 entries, else another), so that a token of an embedding has
        blocks of its own.
      min_size: arrays of fewer elements stay as they are.
      where: the parameters whose moments are stored in 8 bits: a callable ``(path, leaf) -> bool``
        or a pytree of booleans (a prefix is enough). All by default: the embeddings, which others
        leave out because blocks across tokens of different frequency lose the rare ones, too.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`QuantizedState`. Updates have the
      wider dtype of gradients and ``params``; the inner optimizer computes in float32 at least.

    Raises:
      TypeError, ValueError: for an argument of a wrong type or value; at ``init`` for an inner
        transformation of which ``optax.tree.map_params`` cannot find the moments.

    References:
      Dettmers et al., 8-bit optimizers via block-wise quantization (2022), whose codes are decades
      of evenly spaced values, rounded to nearest.

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> tx = ng.quantize_state(optax.scale_by_lion())
      >>> state = tx.init({"w": jnp.ones((128, 512)), "b": jnp.ones(512)})
      >>> state.codes.mu["w"].dtype, state.scales.mu["w"].shape, state.codes.mu["b"].dtype
      (dtype('uint8'), (1, 512), dtype('float32'))
    """
    settings = EightBits(block_size, min_size, where)
    settings.check()
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        state = inner.init(params)
        batch = settings.batch_of_leaves(params)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
        try:
            entries, treedef = entries_of(inner, state, params)
        except Exception as error:
            raise ValueError(
                "quantize_state needs an inner transformation whose moments "
                f"optax.tree.map_params can find, got {inner!r}"
            ) from error
        codes, scales = [], []
        for entry in entries:
            value, scale = entry.value, optax.MaskedNode()
            nb, shape = (
                (None, ()) if entry.leaf is None else (batch[entry.leaf], shapes[entry.leaf])
            )
            is_float = jnp.issubdtype(value.dtype, jnp.floating)
            if nb is not None and is_float and value.shape == shape:
                value, scale = start(value, block_size, nb, entry.name in SECOND_MOMENTS)
            codes.append(value)
            scales.append(scale)
        return QuantizedState(
            jnp.zeros([], jnp.int32), treedef.unflatten(codes), treedef.unflatten(scales)
        )

    def update_fn(updates, state, params=None, **extra_args):
        entries, treedef = entries_of(inner, state.codes, updates)
        scales = treedef.flatten_up_to(state.scales)
        decoded = [
            (entry.value if entry.leaf is None else at_least_float32(entry.value))
            if isinstance(scale, optax.MaskedNode)
            else _decode(entry.name in SECOND_MOMENTS, entry.value, scale)
            for entry, scale in zip(entries, scales, strict=True)
        ]
        new, inner_state = inner.update(
            jax.tree.map(at_least_float32, updates),
            treedef.unflatten(decoded),
            params,
            **extra_args,
        )
        codes, new_scales = [], []
        for i, (entry, scale, value) in enumerate(
            zip(entries, scales, treedef.flatten_up_to(inner_state), strict=True)
        ):
            if isinstance(scale, optax.MaskedNode):
                value = value.astype(entry.value.dtype)
            else:
                value, scale = _stored(i, entry.name in SECOND_MOMENTS, value, scale, state.count)
            codes.append(value)
            new_scales.append(scale)
        new, new_treedef = jax.tree.flatten(new)
        new = [u.astype(t) for u, t in zip(new, update_dtypes(updates, params), strict=True)]
        return new_treedef.unflatten(new), QuantizedState(
            optax.safe_increment(state.count),
            treedef.unflatten(codes),
            treedef.unflatten(new_scales),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@kernel("is_second")
def _decode(is_second, codes, scale):
    return decode(codes, scale, is_second=is_second)


@kernel("salt", "is_second")
def _stored(salt, is_second, value, scale, count):
    """Codes and bounds of what a moment is after a step."""
    value = value.astype(jnp.float32)
    scale = block_max(value, blocks_between(value.shape, scale.shape))
    return dithered(value, scale, count, salt, is_second), scale


@own_arithmetic
def start(
    value: jax.Array, block_size: int, batch: int, is_second: bool
) -> tuple[jax.Array, jax.Array]:
    """Codes and bounds of what an array starts with, rounded to nearest."""
    value = value.astype(jnp.float32)
    bounds = block_sum(value, blocks_of(value.shape, block_size, batch))
    return encode(value, bounds, is_second=is_second), bounds


def dithered(
    value: jax.Array, bounds: jax.Array, count: jax.typing.ArrayLike, salt: int, is_second: bool
) -> jax.Array:
    """Codes of a moment after a step."""
    noise = dither(value.shape, count, salt, STRIDES[0 if is_second else 1])
    return encode(value, bounds, noise, is_second=is_second)


@own_arithmetic
def at_least_float32(x: jax.Array) -> jax.Array:
    """What is kept between steps has few bits, what happens in a step has all."""
    x = jnp.asarray(x)
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if is_narrow else x
