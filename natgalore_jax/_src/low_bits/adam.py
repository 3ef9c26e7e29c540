"""Adam with moments in 8 bits that are never materialised in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgalore_jax._src.kernels.float8_blocks import block_max, blocks_between, decode
from natgalore_jax._src.kernels.kernel import kernel, own_arithmetic
from natgalore_jax._src.low_bits.moments import EightBits, QuantizedState, dithered, start
from natgalore_jax._src.params.checks import check_boolean, check_number
from natgalore_jax._src.params.context import current_subspace
from natgalore_jax._src.params.where import KeyPath, Where, selected, token_matrices
from natgalore_jax._src.states.tree_checks import flatten_like, update_dtypes


def scale_by_adam_8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    nesterov: bool = False,
    block_size: int = 256,
    min_size: int = 4096,
    where: Where = True,
    per_token: Where | None = False,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.scale_by_adam`` with moments of one byte a number instead of four.

    The step is Adam's, in float32, from the decoded moments; :func:`quantize_state` describes the
    codes. The bound of a block is not its largest value, as in :func:`quantize_state`, but

    .. math:: B \leftarrow \beta_1 B + (1 - \beta_1) \max |g|, \qquad
      B_v \leftarrow \beta_2 B_v + (1 - \beta_2) \max g^2,

    which is never less and depends only on the gradient, so that float32 moments are never
    materialised: the step takes less temporary memory than ``optax.scale_by_adam``, and little more
    time on a CPU.

    A parameter that ``per_token`` selects has one second moment for each index of the longer of its
    last two axes, the tokens of an embedding or of an output head:

    .. math:: v_i \leftarrow \beta_2 v_i + (1 - \beta_2)\, \tfrac1d \sum_j g_{ij}^2.

    These moments stay in the dtype of the parameter, so that the state of an embedding is about one
    byte a number instead of two.

    Args:
      b1, b2, eps, eps_root, nesterov: as in ``optax.scale_by_adam``.
      block_size, min_size, where: see :func:`quantize_state`.
      per_token: which parameters have one second moment per token, in the forms of ``where``;
        None: embeddings and output heads, by their names (:func:`hidden_matrices`). Ignored for
        parameters of one axis and for projected parameters.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with the state of
      ``quantize_state(optax.scale_by_adam())``, and updates of the same dtypes.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value; at ``update``
        for gradients of other shapes than at ``init``.

    References:
      Kingma and Ba, Adam (2015); Dettmers et al., 8-bit optimizers (2022). One second moment per
      token: Zhang et al., Adam-mini (2024), arXiv 2406.16793, for embedding and output layer.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tx = ng.scale_by_adam_8bit()
      >>> g = {"w": jnp.full((64, 128), 0.5)}
      >>> updates, state = tx.update(g, tx.init(g))
      >>> bool(jnp.allclose(updates["w"], 1.0)), state.codes.mu["w"].dtype
      (True, dtype('uint8'))
    """
    for name, value in (("b1", b1), ("b2", b2), ("eps", eps), ("eps_root", eps_root)):
        check_number(name, value)
    check_boolean("nesterov", nesterov)
    settings = EightBits(block_size, min_size, where)
    settings.check()
    per_token = token_matrices if per_token is None else per_token

    # 1 − 0.999 in float32 has a relative error of 1e-5: compute complements in Python floats.
    numbers = (b1, 1 - b1, b2, 1 - b2, eps, eps_root)

    @own_arithmetic
    def init_fn(params):
        batch, width = settings.batch_of_leaves(params), _axes_of_width(per_token, params)
        adam: Any = optax.scale_by_adam().init(params)
        treedef = jax.tree.structure(params)
        m, v = map(treedef.flatten_up_to, (adam.mu, adam.nu))
        v = [
            x if axis is None else jnp.sum(x, axis, keepdims=True)
            for x, axis in zip(v, width, strict=True)
        ]
        batch_of_v = [nb if a is None else None for nb, a in zip(batch, width, strict=True)]
        m, m_scale = _stored(m, block_size, batch, is_second=False)
        v, v_scale = _stored(v, block_size, batch_of_v, is_second=True)
        return _state(adam.count, *map(treedef.unflatten, (m, v, m_scale, v_scale)))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        count = optax.safe_increment(state.count)
        trees = (*state.codes[1:], *state.scales[1:])
        entries = [flatten_like(updates, tree, "the parameters at init") for tree in trees]
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        treedef = jax.tree.structure(updates)
        out: list[list[Any]] = [[], [], [], [], []]
        dtypes = update_dtypes(updates, params)
        for leaf, ((path, g), m, v, *scales) in enumerate(zip(leaves, *entries, strict=True)):
            if jnp.shape(g) != m.shape:
                raise ValueError(
                    f"{KeyPath(path)}: the update has shape {jnp.shape(g)}, but the moments made "
                    f"at init have {m.shape}"
                )
            new = _step(leaf, nesterov, dtypes[leaf], numbers, state.count, g, m, v, *scales)
            for column, value in zip(out, new, strict=True):
                column.append(value)
        new, *moments = map(treedef.unflatten, out)
        return new, _state(count, *moments)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adam_with_bits(
    moment_bits: int | None,
    b1: float,
    b2: float,
    eps: float,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Adam with moments in 8 bits, or in Optax's dtypes (None)."""
    if moment_bits is None:
        return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=nesterov)
    if moment_bits != 8 or isinstance(moment_bits, bool):
        raise ValueError(f"moment_bits must be None or 8, got {moment_bits!r}")
    return scale_by_adam_8bit(b1, b2, eps, nesterov=nesterov)


def _stored(moments, block_size, batch, *, is_second):
    """Codes and block scales of moments; a MaskedNode for those of which ``batch`` has None."""
    pairs = [
        (x, optax.MaskedNode()) if nb is None else start(x, block_size, nb, is_second=is_second)
        for x, nb in zip(moments, batch, strict=True)
    ]
    return [x for x, _ in pairs], [scale for _, scale in pairs]


def _state(count, mu, nu, mu_scale, nu_scale) -> QuantizedState:
    codes = optax.ScaleByAdamState(count, mu, nu)
    scales = optax.ScaleByAdamState(optax.MaskedNode(), mu_scale, nu_scale)  # type: ignore[arg-type]
    return QuantizedState(count, codes, scales)


@kernel("leaf", "nesterov", "dtype")
def _step(leaf, nesterov, dtype, numbers, count, g, m, v, m_scale, v_scale):
    """Update, moments and scales of one parameter after a step; ``count`` excludes this step."""
    b1, new1, b2, new2, *_ = numbers
    G = jnp.asarray(g).astype(jnp.float32)
    M = _decoded(m, m_scale, is_second=False)
    V = _decoded(v, v_scale, is_second=True)
    square = G * G
    if V.shape != G.shape:
        width = -2 if V.shape[-2] != G.shape[-2] else -1
        square = jnp.mean(square, width, keepdims=True)
    M, V = b1 * M + new1 * G, b2 * V + new2 * square
    U = _update(G, M, V, optax.safe_increment(count), numbers, nesterov=nesterov)
    m, v = M.astype(m.dtype), V.astype(v.dtype)
    if not isinstance(m_scale, optax.MaskedNode):
        peak = block_max(G, blocks_between(g.shape, m_scale.shape))
        m_scale = b1 * m_scale + new1 * peak
        m = dithered(M, m_scale, count, 2 * leaf, is_second=False)
        if not isinstance(v_scale, optax.MaskedNode):
            v_scale = b2 * v_scale + new2 * (peak * peak)
            v = dithered(V, v_scale, count, 2 * leaf + 1, is_second=True)
    return U.astype(dtype), m, v, m_scale, v_scale


def _decoded(stored, scale, *, is_second):
    if isinstance(scale, optax.MaskedNode):
        return stored.astype(jnp.float32)
    return decode(stored, scale, is_second=is_second)


def _axes_of_width(per_token: Where, params: Any) -> list[int | None]:
    """The shorter of the last two axes of each parameter with one second moment per token."""
    plans = current_subspace() or {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [
        -2 + int(np.argmin(jnp.shape(leaf)[-2:]))
        if chosen and jnp.ndim(leaf) > 1 and str(KeyPath(path)) not in plans
        else None
        for (path, leaf), chosen in zip(
            leaves, selected(per_token, params, "per_token"), strict=True
        )
    ]


def _update(G, M, V, count, constants, *, nesterov):
    """Adam's update from its new moments; ``count`` includes this step."""
    b1, new1, b2, _, eps, eps_root = constants
    M = M / (1 - b1 ** (count + 1)) if nesterov else M / (1 - b1**count)
    if nesterov:
        M = b1 * M + new1 * G / (1 - b1**count)
    return M / (jnp.sqrt(V / (1 - b2**count) + eps_root) + eps)
