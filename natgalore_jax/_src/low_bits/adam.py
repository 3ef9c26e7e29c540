"""Adam with moments in 8 bits that are never materialised in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.float8_blocks import block_max, blocks_between, decode
from natgalore_jax._src.kernels.kernel import kernel, own_arithmetic
from natgalore_jax._src.low_bits.moments import EightBits, QuantizedState, dithered, start
from natgalore_jax._src.params.checks import check_boolean, check_number
from natgalore_jax._src.params.where import KeyPath, Where
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
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.scale_by_adam`` with moments of one byte a number instead of four.

    The step is Adam's, in float32, from the decoded moments; :func:`quantize_state` describes the
    codes. The bound of a block is not its largest value, as in :func:`quantize_state`, but

    .. math:: B \leftarrow \beta_1 B + (1 - \beta_1) \max |g|, \qquad
      B_v \leftarrow \beta_2 B_v + (1 - \beta_2) \max g^2,

    which is never less and depends only on the gradient, so that float32 moments are never
    materialised: the step takes less temporary memory than ``optax.scale_by_adam``, and little more
    time on a CPU.

    Args:
      b1, b2, eps, eps_root, nesterov: as in ``optax.scale_by_adam``.
      block_size, min_size, where: see :func:`quantize_state`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with the state of
      ``quantize_state(optax.scale_by_adam())``, and updates of the same dtypes.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value; at ``update``
        for gradients of other shapes than at ``init``.

    References:
      Kingma and Ba, Adam (2015); Dettmers et al., 8-bit optimizers (2022).

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

    # 1 − 0.999 in float32 has a relative error of 1e-5: compute complements in Python floats.
    numbers = (b1, 1 - b1, b2, 1 - b2, eps, eps_root)

    @own_arithmetic
    def init_fn(params):
        batch = settings.batch_of_leaves(params)
        adam: Any = optax.scale_by_adam().init(params)
        treedef = jax.tree.structure(params)
        codes, scales = [], []
        for is_second, tree in enumerate((adam.mu, adam.nu)):
            pairs = [
                (moment, optax.MaskedNode())
                if nb is None
                else start(moment, block_size, nb, is_second=bool(is_second))
                for moment, nb in zip(treedef.flatten_up_to(tree), batch, strict=True)
            ]
            codes.append(treedef.unflatten(moment for moment, _ in pairs))
            scales.append(treedef.unflatten(scale for _, scale in pairs))
        return _state(adam.count, *codes, *scales)

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


def _state(count, mu, nu, mu_scale, nu_scale) -> QuantizedState:
    codes = optax.ScaleByAdamState(count, mu, nu)
    scales = optax.ScaleByAdamState(optax.MaskedNode(), mu_scale, nu_scale)  # type: ignore[arg-type]
    return QuantizedState(count, codes, scales)


@kernel("leaf", "nesterov", "dtype")
def _step(leaf, nesterov, dtype, numbers, count, g, m, v, *scales):
    """Update, moments and bounds of one parameter after a step; ``count`` excludes this step."""
    b1, new1, b2, new2, *_ = numbers
    G, in_8_bits = jnp.asarray(g).astype(jnp.float32), not isinstance(scales[0], optax.MaskedNode)
    M, V = m.astype(jnp.float32), v.astype(jnp.float32)
    if in_8_bits:
        M, V = (decode(m, scales[0], is_second=False), decode(v, scales[1], is_second=True))
    M, V = b1 * M + new1 * G, b2 * V + new2 * (G * G)
    U = _update(G, M, V, optax.safe_increment(count), numbers, nesterov=nesterov)
    m, v = M.astype(m.dtype), V.astype(v.dtype)
    if in_8_bits:
        peak = block_max(G, blocks_between(g.shape, scales[0].shape))
        scales = (b1 * scales[0] + new1 * peak, b2 * scales[1] + new2 * (peak * peak))
        m = dithered(M, scales[0], count, 2 * leaf, is_second=False)
        v = dithered(V, scales[1], count, 2 * leaf + 1, is_second=True)
    return U.astype(dtype), m, v, *scales


def _update(G, M, V, count, constants, *, nesterov):
    """Adam's update from its new moments; ``count`` includes this step."""
    b1, new1, b2, _, eps, eps_root = constants
    M = M / (1 - b1 ** (count + 1)) if nesterov else M / (1 - b1**count)
    if nesterov:
        M = b1 * M + new1 * G / (1 - b1**count)
    return M / (jnp.sqrt(V / (1 - b2**count) + eps_root) + eps)
