"""Any optimizer with its large moments in 8 bits."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import natgalore_jax._src.states.optax_types  # noqa: F401  registers the states of Optax
from natgalore_jax._src.kernels.dither import STRIDES, dither
from natgalore_jax._src.kernels.float8_blocks import (
    MomentCodes,
    block_max,
    block_sum,
    blocks_between,
    blocks_of,
    decode,
    encode,
)
from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.stacks import for_each, merged
from natgalore_jax._src.params.checks import check_integer, check_transformation
from natgalore_jax._src.params.context import current_subspace
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.params.where import (
    KeyPath,
    Where,
    is_stacked_vector,
    selected,
    shape_and_dtype,
)
from natgalore_jax._src.states.entries import (
    Part,
    SecondMoment,
    StateType,
    check_entries,
    is_masked,
    register_type,
    registered_entries,
    registered_states,
)
from natgalore_jax._src.states.tree_checks import (
    CODES,
    Form,
    check_form,
    check_type,
    flatten_like,
    sees_parts,
    with_update_dtypes,
)


class QuantizedState(NamedTuple):
    """State of :func:`quantize_state` and :func:`scale_by_adam_8bit`."""

    count: jax.typing.ArrayLike  #: shape (), int32: steps taken
    #: The state of the inner optimizer. Where scales has an array: uint8, shape of the parameter.
    #: Of factored second moments the row factor, float32, shape of the parameter without its last
    #: axis.
    codes: Any
    #: A tree of the same structure: float32 block scales, each at least the absolute values of its
    #: block, shape of the parameter except for the axis with blocks; MaskedNode where nothing is in
    #: 8 bits. Of factored second moments the column factor, without the last but one axis.
    scales: Any


class _InnerState(StateType):
    """The state of the inner optimizer, whose types give the codes their meaning."""

    def inner(self, state):
        return jax.tree.map(
            lambda codes, bounds: codes if is_masked(bounds) else MomentCodes(codes, bounds),
            state.codes,
            state.scales,
        )

    def parts(self, state):
        # The number of block scales is about proportional to the size of R, whatever the side.
        scales = Part(None, state.scales, LeafPlan.low_rank_size)
        return [Part(None, (state.count, state.codes)), scales]


register_type(QuantizedState, _InnerState())


class EightBits(NamedTuple):
    """The arguments that select moments for storage in 8 bits."""

    block_size: int
    min_size: int
    where: Where

    def check(self) -> None:
        check_integer("block_size", self.block_size, minimum=32)
        check_integer("min_size", self.min_size, minimum=1)

    def batch_of_leaves(self, params: Any) -> list[int | None]:
        """Number of batch axes of each parameter; None if its moments are not stored in 8 bits."""
        plans = current_subspace() or {}
        out: list[int | None] = []
        leaves = jax.tree_util.tree_leaves_with_path(params)
        for (path, leaf), chosen in zip(leaves, selected(self.where, params), strict=True):
            leaf = shape_and_dtype(path, leaf)
            plan = plans.get(KeyPath(path))
            nb = len(plan.batch) if plan else 0
            # Of one matrix, so that a stack of layers is stored as its layers are.
            size = math.prod(leaf.shape[nb:])
            is_large = leaf.ndim > 0 and size >= self.min_size
            is_large &= jnp.issubdtype(leaf.dtype, jnp.floating)
            if plan is None and is_stacked_vector(path, leaf):
                nb = leaf.ndim - 1  # a block of several layers could not be updated by layer
            out.append(nb if chosen and is_large else None)
        return out

    def check_stored(self, path: Any, g: Any, batch: int | None, codes: Any, scale: Any) -> None:
        """Check that a moment of the shape of its parameter is stored as the settings require."""
        if sees_parts():
            return
        shape, is_coded = jnp.shape(g), not is_masked(scale)
        received = Form(codes.shape, CODES[8] if is_coded else None)
        expected = Form(shape, CODES[8] if batch is not None else None)
        check_form(path, shape, expected, received, "moments", "moment_bits, min_size or where")
        if batch is not None:
            blocks = blocks_of(shape, self.block_size, batch)
            scales = Form((*shape[: blocks.axis], blocks.count, *shape[blocks.axis + 1 :]))
            check_form(path, shape, scales, Form(scale.shape), "block scales", "block_size")


def quantize_state(
    inner: optax.GradientTransformation,
    block_size: int = 256,
    min_size: int = 4096,
    where: Where = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Store the moments of an optimizer in 8 bits, a quarter of their memory in float32.

    Every moment of the inner state that has the shape of its parameter is stored as one byte a
    number and a float32 for each block; the inner optimizer works on float32 arrays that exist
    only during its step. The registered type of the inner state declares its moments
    (:func:`register_state`). All other arrays (counts, step sizes, weights, factored and centred
    statistics, Fisher matrices, gradient histories, moments of small parameters) are unchanged.
    With B the largest absolute value of a block and :math:`c = 2^{-K}` times the power of two above
    B, x is stored as

    .. math:: \operatorname{sign}(x) \cdot \mathrm{fl}_4(|x| + c),

    a float with four bits of mantissa: the error of a number is at most a sixteenth of
    :math:`|x| + c`. First moments have a sign and K = 8; second moments have no sign and K = 16, so
    that their roots cover the same range. A second moment is never decoded as zero, so that updates
    stay bounded. Rounding is dithered and exact on average over the steps; rounding to nearest
    would freeze second moments, which change by a thousandth a step.

    Inside a subspace the codes are transported at a refresh like float32 moments, one layer at a
    time. For Adam use :func:`scale_by_adam_8bit`, which is faster and has no float32 moments even
    during a step: on a CPU the wrapper's step takes twice as long as float32 Adam's.

    Args:
      inner: any transformation with a state of registered types: Optax's, and your own.
      block_size: the largest number of entries that share a block scale, at least 32. Blocks run
        along the shorter of the last two axes (if it has 64 entries, else another), so that each
        token of an embedding has its own blocks.
      min_size: moments of fewer elements are unchanged; of a stack that a subspace projects, those
        of one layer count.
      where: the parameters whose moments are stored in 8 bits: a callable ``(path, leaf) -> bool``
        or a pytree of booleans (a prefix is enough). All by default, embeddings included: other
        libraries exclude embeddings, because their blocks mix tokens of different frequency.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`QuantizedState`. Updates have the
      wider dtype of gradients and ``params``; the inner optimizer computes in float32 at least.

    Raises:
      TypeError, ValueError: for an argument of a wrong type or value; at ``init`` for an inner
        state without any registered type, and for ``optax.flatten``; at ``update`` for another tree
        than at ``init``.

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
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        leaves, params_treedef = jax.tree.flatten(params)
        state = inner.init(params)
        check_entries(
            state,
            params,
            "stored in 8 bits",
            "leave out optax.flatten, or put it around quantize_state",
        )
        values, treedef = jax.tree.flatten(state)
        moments = _moments(treedef, params_treedef)
        batch = settings.batch_of_leaves(params)
        scales: list[Any] = [optax.MaskedNode()] * len(values)
        for number, (leaf, is_second) in moments.items():
            value, nb = values[number], batch[leaf]
            is_float = jnp.issubdtype(value.dtype, jnp.floating)
            if nb is not None and is_float and value.shape == jnp.shape(leaves[leaf]):
                values[number], scales[number] = start(value, block_size, nb, is_second)
        return QuantizedState(
            jnp.zeros([], jnp.int32), treedef.unflatten(values), treedef.unflatten(scales)
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_type(state, QuantizedState, "optimizer or moment_bits")
        stored, treedef = jax.tree.flatten(state.codes)
        scales = treedef.flatten_up_to(state.scales)
        moments = _moments(treedef, jax.tree.structure(updates))
        _check_moments(settings, updates, state.codes, moments, stored, scales)
        is_second = [
            None if is_masked(scale) else moments[number][1] for number, scale in enumerate(scales)
        ]
        plain = [at_least_float32(x) if n in moments else x for n, x in enumerate(stored)]
        found = for_each(_decoded, is_second, (stored, scales), None)
        (decoded,) = merged(found, plain)
        new, inner_state = inner.update(
            jax.tree.map(at_least_float32, updates),
            treedef.unflatten(decoded),
            params,
            **extra_args,
        )
        values = treedef.flatten_up_to(inner_state)
        salts = [np.uint32(number) for number in range(len(values))]
        found = for_each(_stored, is_second, (salts, values, scales), state.count)
        plain = [
            # Not of random keys, which have no other dtype.
            value if found[n] or value.dtype == x.dtype else value.astype(x.dtype)
            for n, (value, x) in enumerate(zip(values, stored, strict=True))
        ]
        codes, new_scales = merged(found, plain, scales)
        return with_update_dtypes(new, updates, params), QuantizedState(
            optax.safe_increment(state.count),
            treedef.unflatten(codes),
            treedef.unflatten(new_scales),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _decoded(is_second, operands, _):
    """A moment before a step, in a tuple."""
    return (decode(*operands, is_second=is_second),)


def _stored(is_second, operands, count):
    """Codes and block scales of a moment after a step."""
    salt, value, scale = operands
    value = value.astype(jnp.float32)
    scale = block_max(value, blocks_between(value.shape, scale.shape))
    return dithered(value, scale, count, salt, is_second), scale


def _moments(treedef: Any, params_treedef: Any) -> dict[int, tuple[int, bool]]:
    """Moments that may be stored in 8 bits: position in the state to (parameter, is_second).

    Without centred pairs, whose variance could be negative after rounding.
    """
    state, found = treedef.unflatten(range(treedef.num_leaves)), {}
    registered = registered_entries(state, params_treedef)
    if treedef.num_leaves and not registered:
        raise ValueError(
            "quantize_state needs an inner transformation whose state has a registered type, got "
            f"{_types_in(state)}: declare its fields by natgalore_jax.register_state"
        )
    for meaning, fields in registered:
        centred = {
            name
            for field, role in meaning.roles.items()
            if isinstance(role, SecondMoment) and role.mean is not None
            for name in (field, role.mean)
        }
        for name, role in meaning.roles.items():
            for leaf, number in enumerate(fields[name]):
                if isinstance(number, int) and name not in centred:
                    found[number] = (leaf, isinstance(role, SecondMoment))
    return found


def _check_moments(settings, updates, codes, moments, stored, scales):
    """Check that moments made at init fit the updates and the settings."""
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    batch = settings.batch_of_leaves(updates)
    for number, (x, scale) in enumerate(zip(stored, scales, strict=True)):
        if is_masked(scale):
            if number in moments and jnp.issubdtype(jnp.result_type(x), jnp.floating):
                path, g = leaves[moments[number][0]]
                if jnp.shape(g) == x.shape:
                    settings.check_stored(path, g, batch[moments[number][0]], x, scale)
            continue
        if number not in moments:
            for meaning, node in registered_states(codes):
                for name in meaning.roles:
                    flatten_like(updates, getattr(node, name), "the parameters at init")
            raise ValueError("the updates have another tree structure than the parameters at init")
        path, g = leaves[moments[number][0]]
        if jnp.shape(g) != x.shape:
            raise ValueError(
                f"{KeyPath(path)}: the update has shape {jnp.shape(g)}, but the moments made at "
                f"init have {x.shape}"
            )
        settings.check_stored(path, g, batch[moments[number][0]], x, scale)


def _types_in(state: Any) -> str:
    """Names of the types of a state and its inner states."""
    names = []

    def visit(x):
        if hasattr(x, "_fields") or dataclasses.is_dataclass(x):
            names.append(type(x).__name__)
        return False

    jax.tree.leaves(state, is_leaf=visit)
    return ", ".join(dict.fromkeys(names)) or type(state).__name__


@own_arithmetic
def start(
    value: jax.Array, block_size: int, batch: int, is_second: bool
) -> tuple[jax.Array, jax.Array]:
    """Codes and block scales of an initial moment, rounded to nearest."""
    value = value.astype(jnp.float32)
    bounds = block_sum(value, blocks_of(value.shape, block_size, batch))
    return encode(value, bounds, is_second=is_second), bounds


def dithered(
    value: jax.Array,
    bounds: jax.Array,
    count: jax.typing.ArrayLike,
    salt: int | jax.Array,
    is_second: bool,
) -> jax.Array:
    """Codes of a moment after a step, with dithered rounding."""
    noise = dither(value.shape, count, salt, STRIDES[0 if is_second else 1])
    return encode(value, bounds, noise, is_second=is_second)


@own_arithmetic
def at_least_float32(x: jax.Array) -> jax.Array:
    """Convert narrower floats to float32 for the computation within a step."""
    x = jnp.asarray(x)
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if is_narrow else x
