"""Adam with moments in 8 bits that are never materialised in float32, and in 16 that decay."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgalore_jax._src.kernels.float8_blocks import block_max, blocks_between, decode
from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.stacks import for_each
from natgalore_jax._src.low_bits.moments import (
    EightBits,
    QuantizedState,
    at_least_float32,
    dithered,
    start,
)
from natgalore_jax._src.low_bits.stochastic_round import rounded
from natgalore_jax._src.params.checks import check_adam, check_boolean, check_eps, check_static
from natgalore_jax._src.params.context import current_subspace
from natgalore_jax._src.params.where import (
    KeyPath,
    Where,
    is_stacked_vector,
    selected,
    shape_and_dtype,
    token_matrices,
)
from natgalore_jax._src.states.tree_checks import (
    Form,
    check_form,
    check_type,
    flatten_like,
    sees_parts,
    update_dtypes,
)

# Larger entries count as this: sums of 1e8 of its squares are float32. An infinite square would
# make its block, or a factored second moment, NaN.
LARGEST = 1e15


def scale_by_adam_8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    nesterov: bool = False,
    block_size: int = 256,
    min_size: int = 4096,
    where: Where = True,
    factored: Where | None = False,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.scale_by_adam`` with moments of one byte a number instead of four.

    The step is Adam's, in float32, from the decoded moments; :func:`quantize_state` describes the
    codes. A block scale is not the largest value, as in :func:`quantize_state`, but

    .. math:: B \leftarrow \beta_1 B + (1 - \beta_1) \max |g|, \qquad
      B_v \leftarrow \beta_2 B_v + (1 - \beta_2) \max g^2,

    which is never less and depends only on the gradient, so that float32 moments are never
    materialised: the step takes less temporary memory than ``optax.scale_by_adam``, and 1.4 times
    its time on a CPU.

    The second moments of a parameter that ``factored`` selects have rank one, as in Adafactor:
    means of squares over rows and over columns, in float32,

    .. math::
      r_i \leftarrow \beta_2 r_i + (1 - \beta_2)\, \overline{g_{i:}^2}, \qquad
      c_j \leftarrow \beta_2 c_j + (1 - \beta_2)\, \overline{g_{:j}^2}, \qquad
      v_{ij} = r_i\, c_j / \bar r,

    so that the state of an embedding is about one byte a number instead of two. The update is not
    clipped by its root mean square as in Adafactor: it is far above 1 in an entry whose row and
    column have small squares elsewhere. Finite entries of a gradient beyond 1e15 count as 1e15, so
    that no square overflows.

    Args:
      b1, b2, eps, eps_root, nesterov: as in ``optax.scale_by_adam``.
      block_size, min_size, where: see :func:`quantize_state`.
      factored: which parameters have factored second moments, over their last two axes, in the
        forms of ``where``; None: embeddings and output heads, by their names
        (:func:`hidden_matrices`). Ignored for parameters of one axis, also where they are stacked,
        and for projected parameters.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with the state of
      ``quantize_state(optax.scale_by_adam())``, and updates of the same dtypes.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value; at ``init``
        for a complex parameter; at ``update`` for gradients of other shapes than at ``init``.

    References:
      Kingma and Ba, Adam (2015); Dettmers et al., 8-bit optimizers (2022). Factored
      second moments: Shazeer and Stern, Adafactor (2018), arXiv 1804.04235, algorithm 2.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tx = ng.scale_by_adam_8bit()
      >>> g = {"w": jnp.full((64, 128), 0.5)}
      >>> updates, state = tx.update(g, tx.init(g))
      >>> bool(jnp.allclose(updates["w"], 1.0)), state.codes.mu["w"].dtype
      (True, dtype('uint8'))
    """
    check_adam(b1, b2, eps)
    check_eps("eps_root", eps_root)
    check_boolean("nesterov", nesterov)
    settings = EightBits(block_size, min_size, where)
    settings.check()
    factored = token_matrices if factored is None else factored

    # 1 − 0.999 in float32 has a relative error of 1e-5: compute complements in Python floats.
    numbers = (b1, 1 - b1, b2, 1 - b2, eps, eps_root)

    @own_arithmetic
    def init_fn(params):
        _check_real(params)
        batch, has_factors = settings.batch_of_leaves(params), _has_factors(factored, params)
        adam: Any = optax.scale_by_adam().init(params)
        treedef = jax.tree.structure(params)
        m, v = map(treedef.flatten_up_to, (adam.mu, adam.nu))
        m, m_scale = _stored(m, block_size, batch, is_second=False)
        v, v_scale = _stored(v, block_size, batch, has_factors, is_second=True)
        return _state(adam.count, *map(treedef.unflatten, (m, v, m_scale, v_scale)))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_type(state, QuantizedState, "optimizer or moment_bits")
        count = optax.safe_increment(state.count)
        trees = (*state.codes[1:], *state.scales[1:])
        entries = [flatten_like(updates, tree, "the parameters at init") for tree in trees]
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        treedef = jax.tree.structure(updates)
        dtypes = update_dtypes(updates, params)
        for (path, g), m in zip(leaves, entries[0], strict=True):
            if jnp.shape(g) != m.shape:
                raise ValueError(
                    f"{KeyPath(path)}: the update has shape {jnp.shape(g)}, but the moments made "
                    f"at init have {m.shape}"
                )
        _check_stored(settings, factored, updates, entries)
        G = [jnp.asarray(g) for _, g in leaves]
        salts = [np.uint32(2 * i) for i in range(len(G))]
        own = [(nesterov, dtype) for dtype in dtypes]
        found = for_each(_step, own, (salts, G, *entries), (numbers, state.count))
        new, *moments = zip(*found, strict=True) if found else [()] * 5
        return treedef.unflatten(new), _state(count, *map(treedef.unflatten, moments))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adam_in_float32(
    b1: float, b2: float, eps: float, *, nesterov: bool = False, mu_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """``optax.scale_by_adam`` that computes in float32 also where it stores 16 bits.

    In bfloat16 0.999 is 1, and rounding to nearest loses a change by a thousandth, so that a second
    moment would never decay: it is rounded stochastically. In float16 most squares of gradients are
    zero: second moments of float16 parameters are float32. In float32 nothing differs.
    """
    adam: Any = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=nesterov, mu_dtype=mu_dtype)

    def init_fn(params):
        state = adam.init(params)
        return state._replace(nu=jax.tree.map(_without_float16, state.nu))

    @own_arithmetic
    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        mu, nu, wide = jax.tree.map(at_least_float32, (state.mu, state.nu, updates))
        found, new = adam.update(wide, state._replace(mu=mu, nu=nu))
        dtypes = jax.tree.map(jnp.result_type, updates, state.mu if mu_dtype is None else state.nu)
        return jax.tree.map(jnp.astype, found, dtypes), new._replace(
            mu=optax.tree.cast_like(new.mu, state.mu),
            nu=_rounded_like(new.nu, state.nu, state.count),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _without_float16(v: jax.Array) -> jax.Array:
    return v.astype(jnp.float32) if v.dtype == jnp.float16 else v


def _rounded_like(new: Any, old: Any, count: jax.typing.ArrayLike) -> Any:
    leaves, treedef = jax.tree.flatten(new)
    pairs = zip(leaves, treedef.flatten_up_to(old), strict=True)
    return treedef.unflatten(rounded(v, w.dtype, count, i) for i, (v, w) in enumerate(pairs))


def adam_with_bits(
    moment_bits: int | None,
    b1: float,
    b2: float,
    eps: float,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Adam with moments in 8 bits, or in Optax's dtypes (None)."""
    if moment_bits is None:
        check_adam(b1, b2, eps)
        return adam_in_float32(b1, b2, eps, nesterov=nesterov)
    check_static("moment_bits", moment_bits, "None or 8")
    if moment_bits != 8 or isinstance(moment_bits, bool):
        raise ValueError(f"moment_bits must be None or 8, got {moment_bits!r}")
    return scale_by_adam_8bit(b1, b2, eps, nesterov=nesterov)


def _stored(moments, block_size, batch, has_factors=None, *, is_second):
    """Zero moments and their block scales, or factors, or MaskedNode where there are none."""
    pairs: list[tuple[Any, Any]] = []
    for x, nb, factors in zip(moments, batch, has_factors or [False] * len(batch), strict=True):
        if factors:
            # In bfloat16 1 − β₂ would be rounded away: a factor would stop at half its value.
            pairs.append((jnp.sum(x, -1, dtype=jnp.float32), jnp.sum(x, -2, dtype=jnp.float32)))
        elif nb is None:
            pairs.append((_without_float16(x) if is_second else x, optax.MaskedNode()))
        else:
            pairs.append(start(x, block_size, nb, is_second=is_second))
    return [x for x, _ in pairs], [scale for _, scale in pairs]


def _check_stored(settings: EightBits, factored: Where, updates: Any, entries: Any) -> None:
    """Check that moments made at init are stored as the arguments require."""
    if sees_parts():
        return
    batch, has_factors = settings.batch_of_leaves(updates), _has_factors(factored, updates)
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    for (path, g), nb, factors, m, v, m_scale, v_scale in zip(
        leaves, batch, has_factors, *entries, strict=True
    ):
        shape = jnp.shape(g)
        settings.check_stored(path, g, nb, m, m_scale)
        expected = Form(shape[:-1]) if factors else Form(shape)
        check_form(path, shape, expected, Form(v.shape), "second moments", "factored")
        if not factors:
            settings.check_stored(path, g, nb, v, v_scale)


def _state(count, mu, nu, mu_scale, nu_scale) -> QuantizedState:
    # A copy, because a buffer can be donated once only.
    codes = optax.ScaleByAdamState(jnp.copy(count), mu, nu)
    scales = optax.ScaleByAdamState(optax.MaskedNode(), mu_scale, nu_scale)  # type: ignore[arg-type]
    return QuantizedState(count, codes, scales)


def _step(settings, operands, shared):
    """Update, moments and scales of one parameter after a step; ``count`` excludes this step."""
    (nesterov, dtype), (numbers, count) = settings, shared
    salt, g, m, v, m_scale, v_scale = operands
    numbers = tuple(jnp.asarray(x, jnp.float32) for x in numbers)
    b1, new1, b2, new2, *_ = numbers
    G = _in_range(g.astype(jnp.float32))
    peak = None
    if not isinstance(m_scale, optax.MaskedNode):
        peak = block_max(G, blocks_between(g.shape, m_scale.shape))
    M = b1 * _decoded(m, m_scale, is_second=False) + new1 * G
    is_factored = v.ndim < G.ndim
    if is_factored:
        V, v, v_scale = _rank_one(b2, new2, G, v, v_scale)
    else:
        V = b2 * _decoded(v, v_scale, is_second=True) + new2 * (G * G)
    U = _update(G, M, V, optax.safe_increment(count), numbers, nesterov=nesterov)
    if peak is None:
        m = M.astype(m.dtype)
        v = v if is_factored else rounded(V, v.dtype, count, salt + 1)
    else:
        m_scale = b1 * m_scale + new1 * peak
        m = dithered(M, m_scale, count, salt, is_second=False)
        if not is_factored:
            v_scale = b2 * v_scale + new2 * (peak * peak)
            v = dithered(V, v_scale, count, salt + 1, is_second=True)
    return U.astype(dtype), m, v, m_scale, v_scale


def _in_range(G):
    """Finite entries clipped to ``LARGEST``."""
    return jnp.where(jnp.isfinite(G), jnp.clip(G, -LARGEST, LARGEST), G)


def _rank_one(b2, new2, G, rows, columns):
    """Second moments from their new factors, and the new factors."""
    square = G * G
    r, c = b2 * rows + new2 * jnp.mean(square, -1), b2 * columns + new2 * jnp.mean(square, -2)
    mean = jnp.mean(r, -1, keepdims=True)
    # Divide first: the product of two means of squares may underflow.
    V = (r / jnp.where(mean == 0, 1.0, mean))[..., None] * c[..., None, :]
    return V, r, c


def _decoded(stored, scale, *, is_second):
    if isinstance(scale, optax.MaskedNode):
        return stored.astype(jnp.float32)
    return decode(stored, scale, is_second=is_second)


def _has_factors(factored: Where, params: Any) -> list[bool]:
    """Whether the second moments of each parameter are factored."""
    plans = current_subspace() or {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    chosen = selected(factored, params, "factored")
    return [
        is_chosen
        and jnp.ndim(leaf) > 1
        and 0 not in jnp.shape(leaf)  # without means
        and not is_stacked_vector(path, leaf)
        and KeyPath(path) not in plans
        for (path, leaf), is_chosen in zip(leaves, chosen, strict=True)
    ]


def _check_real(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = shape_and_dtype(path, leaf).dtype
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{KeyPath(path)}: scale_by_adam_8bit takes real parameters, got {dtype}: train it "
                "with optax.scale_by_adam, through optax.partition"
            )


def _update(G, M, V, count, constants, *, nesterov):
    """Adam's update from its new moments; ``count`` includes this step."""
    b1, new1, b2, _, eps, eps_root = constants
    M = M / (1 - b1 ** optax.safe_increment(count)) if nesterov else M / (1 - b1**count)
    if nesterov:
        M = b1 * M + new1 * G / (1 - b1**count)
    return M / (jnp.sqrt(V / (1 - b2**count) + eps_root) + eps)
