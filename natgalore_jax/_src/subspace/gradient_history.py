"""History of the last gradients of one parameter, and the natural gradient from it.

Shapes: B are the batch axes of the parameter, s the length of the history, K the axes of one
gradient, k its number of elements. Formulas are for one matrix, with ``H`` (k, s).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.linear_codes import (
    LinearCodes,
    Stored,
    coded_bits,
    encode_zeros,
    leaves_of,
    load,
    store,
)
from natgalore_jax._src.kernels.rotation import rotate_linear
from natgalore_jax._src.params.placement import in_auto_axes, place_like, zeros_on_axes
from natgalore_jax._src.params.plan import LeafPlan
from natgalore_jax._src.states.entries import Part, StateType, register_type

# A gradient with larger entries is scaled down to it: inner products, and products of their
# inverses, stay in the range of float32.
LARGEST = 1e12


class History(NamedTuple):
    """A ring buffer of gradients with its Gram matrix.

    In the state of a transformation each field is a tree of parameters, with MaskedNode where a
    parameter has no history.
    """

    #: B + (s,) + K, history_dtype: the columns of H, initially zero. In 8 or 4 bits LinearCodes of
    #: two such trees, with blocks within each column.
    columns: Any
    gram: Any  #: B + (s, s), float32: HᵀH
    checksum: Any  #: B + (s,), float32: of the bits of each column, equal for copies
    #: B, int32: number of finite gradients since the start or a reset; modulo s the number of the
    #: column that the next gradient replaces
    filled: Any


class _PastGradients(StateType):
    def entries(self, state, flatten):
        columns, *others = state
        names = state._fields
        return dict(zip(names, (leaves_of(flatten, columns), *map(flatten, others)), strict=True))

    def parts(self, state):
        small = (state.gram, state.checksum, state.filled)
        return [
            Part("history", state.columns, LeafPlan.low_rank_size),
            Part("history", small, lambda plan: 1),
        ]

    def moved(self, fields, change):
        """Rotate or reset the history of one matrix."""
        if change.transition == "reset":
            return jax.tree.map(jnp.zeros_like, fields)
        stored_columns, shape = fields["columns"], change.matrix_shape

        def rotate(i, columns):
            stored = _column(columns, i)
            h = rotate_linear(load(stored, shape, jnp.float32), change.C_of_axis)
            return jax.tree.map(lambda x, y: _put(x, y, i), columns, store(h, stored))

        # For one product with all columns XLA would lay out the buffer with s innermost, and copy
        # it there and back at every step: rotate column by column, in place.
        length = fields["gram"].shape[-1]
        columns = jax.lax.fori_loop(0, length, rotate, stored_columns)

        def column(i):
            return load(_column(columns, i), shape, jnp.float32)

        gram, checksum = jax.lax.map(
            lambda i: (_products(columns, column(i), 0), _checksum(column(i), 0)),
            jnp.arange(length),
        )
        return {**fields, "columns": columns, "gram": gram, "checksum": checksum}


register_type(History, _PastGradients())


def empty_history(length: int, batch_ndim: int, gradient: jax.Array, dtype: Any) -> History:
    """Empty history for gradients of this shape and sharding, B + K."""
    batch_shape, bits = gradient.shape[:batch_ndim], coded_bits(dtype)

    def zeros_of(shape: tuple[int, ...]) -> jax.Array:
        first = jnp.expand_dims(
            zeros_on_axes(gradient, batch_ndim, jnp.float32),
            tuple(range(batch_ndim, batch_ndim + len(shape))),
        )
        return jnp.broadcast_to(first, (*batch_shape, *shape))

    zeros: Any = jnp.zeros_like(gradient, dtype=dtype if bits is None else jnp.float32)
    if bits is not None and gradient.ndim > batch_ndim:
        zeros = encode_zeros(zeros, bits, batch_ndim)
    return History(
        columns=jax.tree.map(
            lambda x: jnp.broadcast_to(
                jnp.expand_dims(x, batch_ndim), (*batch_shape, length, *x.shape[batch_ndim:])
            ),
            zeros,
        ),
        gram=zeros_of((length, length)),
        checksum=zeros_of((length,)),
        filled=zeros_on_axes(gradient, batch_ndim, jnp.int32),
    )


def natural_gradient(
    history: History,
    h: jax.Array,
    damping: jax.typing.ArrayLike,
    *,
    relative: bool,
) -> tuple[jax.Array, History]:
    r"""``h̃ = (λI + HHᵀ)⁻¹ h_t = H (λI + HᵀH)⁻¹ e_t``, with ``h_t = h`` the newest column of H.

    Because ``h_t`` is a column of H, one s × s solve and one product suffice, without cancellation:
    the two-term form ``(h_t − H(λI + HᵀH)⁻¹Hᵀh_t)/λ`` loses all digits in float32 once
    ``λmax(HᵀH)/λ`` is near 1e7. Nearly parallel columns make ``λI + HᵀH`` itself ill-conditioned;
    docs/mathematics.md has a bound. The Gram matrix is updated by the row and column ``Hᵀh_t``,
    in O(k s) operations instead of O(k s²).

    Args:
      history: of the previous gradients.
      h: B + K, the newest gradient; rounded to the dtype of the history before use.
      damping: scalar; λ in units of gradient², or ρ with ``λ = ρ tr(HᵀH) / s`` if relative, s the
        number of gradients so far, up to the length of the history.
      relative: whether ``damping`` is relative.

    Returns:
      h̃ (B + K, float32), and the history with h in it. A non-finite gradient gives a non-finite h̃
      and does not enter the history, where it would spoil the next s steps.
    """
    columns, nb = history.columns, history.filled.ndim
    s = history.gram.shape[-1]
    slot = history.filled % s
    is_new = jnp.arange(s) == slot[..., None]  # B + (s,): the column of the oldest gradient
    oldest = _of_each(_column, nb)(columns, slot)
    stored = store(_shrunk(h, oldest, nb), oldest, nb)
    h = load(stored, h.shape, jnp.float32, nb)
    h_energy = _inner(h, h, nb)
    row = jnp.where(is_new, h_energy[..., None], _products(columns, h, nb))
    gram = jnp.where(is_new[..., :, None], row[..., None, :], history.gram)
    gram = jnp.where(is_new[..., None, :], row[..., :, None], gram)
    checksum = jnp.where(is_new, _checksum(h, nb)[..., None], history.checksum)

    energy = jnp.diagonal(gram, axis1=-2, axis2=-1)
    lam = place_like(jnp.broadcast_to(jnp.asarray(damping, jnp.float32), slot.shape), slot)
    if relative:
        lam = lam * jnp.sum(energy, -1) / jnp.minimum(history.filled + 1, s)
    # An all-zero history has a relative λ of 0; any positive λ gives the solution, zero.
    lam = jnp.clip(lam, jnp.finfo(jnp.float32).tiny, jnp.finfo(jnp.float32).max)
    w = in_auto_axes(_solve, energy)(gram, energy, checksum, slot, lam)

    # XLA updates the columns, the largest buffer, in place only if the write depends on the read of
    # the old columns (through w) and the sum reads the new columns. Any other order copies them.
    finite = jnp.isfinite(h_energy) & jnp.all(jnp.isfinite(w), axis=-1)
    kept = jax.tree.map(lambda x, y: jnp.where(_expand(finite, x.ndim), x, y), stored, oldest)
    columns = jax.tree.map(lambda x, y: _of_each(_put, nb)(x, y, slot), columns, kept)
    new = History(
        columns=columns,
        gram=jnp.where(_expand(finite, nb + 2), gram, history.gram),
        checksum=jnp.where(_expand(finite, nb + 1), checksum, history.checksum),
        filled=jnp.where(finite, optax.safe_increment(history.filled), history.filled),
    )
    natural = jnp.zeros(h.shape, jnp.float32)
    for i in range(s):
        column = load(_column(columns, i, nb), h.shape, jnp.float32, nb)
        natural = natural + column.astype(jnp.float32) * _expand(w[..., i], h.ndim)
    return natural, new


def _shrunk(h: jax.Array, like: Stored, nb: int) -> jax.Array:
    """h with no finite entry beyond ``LARGEST``, nor beyond half the range of its storage."""
    largest = LARGEST
    if not isinstance(like, LinearCodes):
        largest = min(largest, float(jnp.finfo(like.dtype).max) / 2)
    h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    peak = jnp.max(jnp.abs(h), tuple(range(nb, h.ndim)), keepdims=True)
    return h * jnp.where(peak > largest, largest / peak, 1.0)


def _solve(gram, energy, checksum, slot, damping):
    """``(λI + HᵀH)⁻¹ e_t`` up to vectors that H maps to zero, by Cholesky in float32.

    If an older column equals the newest gradient, ``e_t`` has a component of size one in the null
    space of H, which λ⁻¹ amplifies and H must cancel. Merging equal columns into one with the
    weight √(their number) leaves HHᵀ unchanged and removes these null vectors.
    """
    s, eps = gram.shape[-1], jnp.finfo(jnp.float32).eps
    rows, cols = energy[..., :, None], energy[..., None, :]
    # Sums in another order differ in the last bits, whereas checksums of copies are equal.
    parallel = (jnp.abs(gram - rows) <= 8 * eps * rows) & (jnp.abs(gram - cols) <= 8 * eps * cols)
    copies = parallel & (checksum[..., :, None] == checksum[..., None, :])
    copies = copies | jnp.eye(s, dtype=bool)
    age = jnp.mod(slot[..., None] - jnp.arange(s, dtype=jnp.int32), s)
    is_newest = ~jnp.any(copies & (age[..., None, :] < age[..., :, None]), axis=-1)
    weight = jnp.where(is_newest, jnp.sqrt(jnp.sum(copies, -1).astype(jnp.float32)), 0.0)
    K = gram * weight[..., :, None] * weight[..., None, :]
    identity = jnp.broadcast_to(jnp.eye(s, dtype=jnp.float32), K.shape)
    A = K + damping[..., None, None] * identity
    # Entries have errors of δ ‖h_i‖ ‖h_j‖ with δ of about eps (see _inner), which move eigenvalues
    # of the matrix scaled to a unit diagonal by at most s δ; Cholesky moves them as much. With a
    # smaller λ the matrix of nearly parallel gradients could be indefinite: add a jitter. One step
    # of iterative refinement removes its effect on larger eigenvalues.
    rounding = (4 + s) * eps * energy * weight**2
    jitter = jnp.maximum(rounding - damping[..., None], 0.0)
    L = jnp.linalg.cholesky(A + jitter[..., None] * identity)

    def solve(b):
        return jax.scipy.linalg.cho_solve((L, True), b[..., None])[..., 0]

    e_t = (age == 0).astype(jnp.float32)
    w = solve(e_t)
    w = w + solve(e_t - jnp.einsum("...ij,...j->...i", A, w, precision="highest"))
    return w * weight / jnp.sum(e_t * weight, -1, keepdims=True)


def _products(columns: Stored, h: jax.Array, nb: int) -> jax.Array:
    """``Hᵀ h``, B + (s,)."""
    if isinstance(columns, LinearCodes):
        # One column at a time: decoding all at once would take the memory that codes save.
        rows = jax.lax.map(
            lambda i: _inner(load(_column(columns, i, nb), h.shape, jnp.float32, nb), h, nb),
            jnp.arange(columns.codes.shape[nb]),
        )
        return jnp.moveaxis(rows, 0, -1)
    return _inner(columns, jnp.expand_dims(h, nb), nb + 1)


def _inner(x: jax.Array, y: jax.Array, nb: int) -> jax.Array:
    """Inner products over the axes from ``nb`` on, to a few units in the last place.

    A matrix-vector product on CPUs sums sequentially: at 10⁷ elements its relative error is 10⁻³,
    10⁴ times the error of the product of two vectors on the diagonal of the Gram matrix. A fused
    sum is accurate, and makes no float32 copy of a bfloat16 history.
    """
    product = x.astype(jnp.float32) * y.astype(jnp.float32)
    return jnp.sum(product, axis=tuple(range(nb, product.ndim)))


def _checksum(h: jax.Array, nb: int) -> jax.Array:
    """24 bits of a checksum of each gradient's bits, as float32.

    Integer sums of copies are equal in any order of summation, and differ for gradients that differ
    in the last bit of an element, which a sum of floats would round away.
    """
    # Adding zero turns -0 into +0.
    out = jax.lax.bitcast_convert_type(h.astype(jnp.float32) + 0.0, jnp.uint32)
    for axis in range(h.ndim - 1, nb - 1, -1):
        i = jnp.arange(1, h.shape[axis] + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
        odd = (i ^ (i >> 15)) * jnp.uint32(0x85EBCA77) | jnp.uint32(1)
        out = jnp.sum(out * odd.reshape((1,) * axis + (-1,)), axis=axis, dtype=jnp.uint32)
    return (out >> 8).astype(jnp.float32)


def _column(columns: Stored, i: jax.typing.ArrayLike, nb: int = 0) -> Stored:
    """One of the columns as stored, B + K."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, nb, keepdims=False), columns)


def _put(columns: jax.Array, column: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(columns, column, i, 0)


def _of_each(function: Callable[..., Any], nb: int) -> Callable[..., Any]:
    """``function`` of one matrix, for nb batch axes."""
    for _ in range(nb):
        function = jax.vmap(function)
    return function


def _expand(x: jax.Array, ndim: int) -> jax.Array:
    return jnp.expand_dims(x, tuple(range(x.ndim, ndim)))
