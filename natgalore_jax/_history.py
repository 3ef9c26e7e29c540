"""The last gradients of one parameter, and the natural gradient computed from them.

Shapes: B are the batch axes of the parameter, s the length of the history, K the axes of one
gradient, k its number of elements. Formulas are for one matrix, with ``H`` (k, s).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from natgalore_jax._contract import contract
from natgalore_jax._transition import rotate_linear


class History(NamedTuple):
    """A ring buffer of gradients with its Gram matrix."""

    columns: jax.Array  # B + (s,) + K, history_dtype: the columns of H, zero where never filled
    gram: jax.Array  # B + (s, s), float32: HᵀH
    checksum: jax.Array  # B + (s,), float32: the sum of each column, tells copies from near copies
    filled: jax.Array  # B, int32: the number of gradients seen since the start or a reset, up to s

    def moved(self, transition: str, C_of_axis: Mapping[int, jax.Array]) -> "History":
        """One matrix's history in the coordinates of a new basis: rotated, or emptied."""
        if transition == "reset":
            return jax.tree.map(jnp.zeros_like, self)
        columns = rotate_linear(self.columns, {axis + 1: C for axis, C in C_of_axis.items()})
        return self._replace(columns=columns, gram=_gram(columns), checksum=_checksum(columns, 1))


def empty_history(
    length: int, batch_shape: tuple[int, ...], shape: tuple[int, ...], dtype
) -> History:
    return History(
        columns=jnp.zeros((*batch_shape, length, *shape), dtype),
        gram=jnp.zeros((*batch_shape, length, length), jnp.float32),
        checksum=jnp.zeros((*batch_shape, length), jnp.float32),
        filled=jnp.zeros(batch_shape, jnp.int32),
    )


def push(history: History, h: jax.Array, slot: jax.Array) -> History:
    """Writes ``h`` (B + K) into column ``slot`` and updates the Gram matrix by one row and column.

    The row is ``Hᵀ h``: O(k s) operations, where the whole Gram matrix would take O(k s²).
    """
    nb = history.filled.ndim
    h = h.astype(history.columns.dtype)
    columns = jax.lax.dynamic_update_index_in_dim(history.columns, h, slot, nb)
    row = _products(columns, h, nb)
    gram = jax.lax.dynamic_update_index_in_dim(history.gram, row, slot, nb)
    gram = jax.lax.dynamic_update_index_in_dim(gram, row, slot, nb + 1)
    checksum = jax.lax.dynamic_update_index_in_dim(history.checksum, _checksum(h, nb), slot, nb)
    filled = jnp.minimum(history.filled + 1, columns.shape[nb])
    return History(columns, gram, checksum, filled)


def natural_gradient(
    history: History, slot: jax.Array, damping: jax.Array, *, relative: bool
) -> jax.Array:
    r"""``h̃ = (λI + HHᵀ)⁻¹ h_t = H (λI + HᵀH)⁻¹ e_t``, the newest gradient ``h_t`` in column ``slot``.

    Because ``h_t`` is itself a column of H, one s × s solve and one product suffice, and nothing
    cancels: the two-term form ``(h_t − H(λI + HᵀH)⁻¹Hᵀh_t)/λ`` loses all digits in float32 once
    ``λmax(HᵀH)/λ`` is near 1e7.

    Args:
      history: with the newest gradient already pushed.
      slot: scalar int32, the column of the newest gradient.
      damping: scalar; λ in units of gradient², or ρ with ``λ = ρ tr(HᵀH) / filled`` if relative.
      relative: which of the two.

    Returns:
      B + K, float32.
    """
    gram, nb = history.gram, history.filled.ndim
    energy = jnp.diagonal(gram, axis1=-2, axis2=-1)
    damping = jnp.broadcast_to(jnp.asarray(damping, jnp.float32), history.filled.shape)
    if relative:
        damping = damping * jnp.sum(energy, -1) / jnp.maximum(history.filled, 1)
    # With a relative λ an all-zero history has λ = 0; any positive λ gives its answer, zero.
    damping = jnp.where(damping > 0, damping, 1.0)
    w = _solve(gram, energy, history.checksum, slot, damping)
    batch, K = _letters(nb, history.columns.ndim - nb - 1)
    return contract(f"{batch}s{K},{batch}s->{batch}{K}", history.columns, w, dtype=jnp.float32)


def _solve(gram, energy, checksum, slot, damping):
    """``(λI + HᵀH)⁻¹ e_t`` up to vectors that H maps to zero, by Cholesky in float32.

    If the newest gradient also stands in an older column, ``e_t`` has a part of size one in the
    null space of H, which λ⁻¹ amplifies and H must cancel. So equal columns are merged into one
    with the weight √(their number), for which HHᵀ is the same, and the null vectors are gone.
    """
    s = gram.shape[-1]
    same = (
        (gram == energy[..., :, None])
        & (gram == energy[..., None, :])
        & (checksum[..., :, None] == checksum[..., None, :])
    ) | jnp.eye(s, dtype=bool)
    # Of equal columns the newest stays; column t is the newest, t + 1 (mod s) the oldest.
    age = jnp.mod(slot - jnp.arange(s), s)
    stays = ~jnp.any(same & (age[None, :] < age[:, None]), axis=-1)
    weight = jnp.where(stays, jnp.sqrt(jnp.sum(same, -1).astype(jnp.float32)), 0.0)
    K = gram * weight[..., :, None] * weight[..., None, :]
    # Rounding perturbs each diagonal entry by a few ulps; no less is added, so that a λ far below
    # them cannot leave the matrix indefinite.
    rounding = 4 * jnp.finfo(jnp.float32).eps * energy * weight**2
    diagonal = jnp.maximum(damping[..., None], rounding)
    e_t = jax.nn.one_hot(slot, s, dtype=jnp.float32)
    L = jnp.linalg.cholesky(K + diagonal[..., None] * jnp.eye(s))
    rhs = jnp.broadcast_to(e_t, energy.shape)[..., None]
    w = jax.scipy.linalg.cho_solve((L, True), rhs)[..., 0]
    newest_weight = jnp.take(weight, slot, axis=-1)[..., None]
    return w * weight / newest_weight


def _letters(nb: int, nk: int) -> tuple[str, str]:
    return "abcdefg"[:nb], "ijklmnop"[:nk]


def _products(columns: jax.Array, h: jax.Array, nb: int) -> jax.Array:
    batch, K = _letters(nb, h.ndim - nb)
    return contract(
        f"{batch}s{K},{batch}{K}->{batch}s", columns, h, dtype=jnp.float32, precision="highest"
    )


def _gram(columns: jax.Array) -> jax.Array:
    _, K = _letters(0, columns.ndim - 1)
    return contract(f"s{K},t{K}->st", columns, columns, dtype=jnp.float32, precision="highest")


def _checksum(h: jax.Array, nb: int) -> jax.Array:
    return jnp.sum(h, axis=tuple(range(nb, h.ndim)), dtype=jnp.float32)
