"""Compact Fisher matrix of low-rank gradients: one factor of r or r² numbers per projected side.

Shapes: B are the batch axes of the parameter, F the axes of a factor, (r,) if diagonal and (r, r)
if full. Formulas are for one matrix projected on its left side, R (r, n).
"""

import string

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.projection import contract
from natgalore_jax._src.kernels.rotation import rotate_second_moment

_TINY = float(jnp.finfo(jnp.float32).tiny)


def moved_factor(A: jax.Array, C: jax.Array) -> jax.Array:
    """``A' = C A Cᵀ + (I − C Cᵀ) tr(A) / r``, or its diagonal for a diagonal A.

    The part of a new direction outside the old basis was never observed and takes the mean.
    """
    if A.ndim == 1:
        return rotate_second_moment(A, {0: C})
    r = A.shape[0]
    unseen = jnp.eye(r, dtype=C.dtype) - jnp.matmul(C, C.T, precision="highest")
    moved = jnp.matmul(C, jnp.matmul(A, C.T, precision="highest"), precision="highest")
    return moved + unseen * (jnp.trace(A) / r)


def gram(R: jax.Array, axis: int, batch_ndim: int, *, diagonal: bool) -> jax.Array:
    """``R Rᵀ`` over all axes of a gradient except ``axis``, or its diagonal: B + F, float32."""
    letters, batch, a = _letters(R, axis, batch_ndim)
    R = R.astype(jnp.float32)
    if diagonal:
        return contract(f"{letters},{letters}->{batch}{a}", R, R)
    subscripts = f"{letters},{letters.replace(a, a.upper())}->{batch}{a}{a.upper()}"
    return contract(subscripts, R, R, precision="highest")


def averaged(
    A: jax.Array, new: jax.Array, decay: jax.typing.ArrayLike, batch_ndim: int
) -> jax.Array:
    """``β A + (1 − β) A'``, starting at the first A'; a non-finite A' is skipped."""
    own = tuple(range(batch_ndim, A.ndim))
    is_empty = jnp.sum(jnp.abs(A), own, keepdims=True) == 0
    is_finite = jnp.isfinite(jnp.sum(new, own, keepdims=True))
    return jnp.where(is_finite, new + jnp.where(is_empty, 0.0, decay) * (A - new), A)


def inverse_power(
    A: jax.Array,
    damping: jax.typing.ArrayLike,
    exponent: float,
    batch_ndim: int,
    *,
    relative: bool,
) -> jax.Array:
    """``(A + λ I)^p`` for p < 0, up to a factor for each matrix, with λ = ρ tr(A) / r if relative.

    The identity, up to a factor, where A and λ are zero. Eigenvalues of a full A + λ I are clipped
    to at least 4 eps tr(A), their accuracy.
    """
    diagonal = A.ndim == batch_ndim + 1
    trace = jnp.sum(A, -1) if diagonal else jnp.trace(A, axis1=-2, axis2=-1)
    mean = (trace / A.shape[-1])[..., None]
    # Squares of gradients can be too small for float32: normalise A to a mean diagonal of one.
    unit = jnp.where(mean > 0, mean, 1.0)
    shift = jnp.asarray(damping, jnp.float32)
    if not relative:
        shift = shift / unit
    if diagonal:
        # For A = 0 and λ = 0 any multiple of the identity is valid.
        return jnp.power(jnp.maximum(A / unit + shift, _TINY), exponent)
    w, U = jnp.linalg.eigh(A / unit[..., None])
    # The eigenvalues sum to r with errors of r eps, which the power p would amplify for a small λ:
    # clip eigenvalues below a few r eps.
    rounding = 4 * A.shape[-1] * jnp.finfo(jnp.float32).eps
    w = jnp.maximum(jnp.where(mean > 0, w, 1.0) + shift, rounding)
    return jnp.matmul(
        U * jnp.power(w, exponent)[..., None, :], jnp.swapaxes(U, -1, -2), precision="highest"
    )


def multiply(
    W: jax.Array, N: jax.Array, axis: int, batch_ndim: int, precision: str | None = None
) -> jax.Array:
    """``W N`` along one axis of N; W has shape B + F."""
    letters, batch, a = _letters(N, axis, batch_ndim)
    if W.ndim == batch_ndim + 1:
        return contract(f"{batch}{a},{letters}->{letters}", W, N, precision=precision)
    subscripts = f"{batch}{a.upper()}{a},{letters}->{letters.replace(a, a.upper())}"
    return contract(subscripts, W, N, precision=precision)


def _letters(x: jax.Array, axis: int, batch_ndim: int) -> tuple[str, str, str]:
    """Index letters of all axes of x, of its batch axes, and of one of its other axes."""
    letters = string.ascii_lowercase[: x.ndim]
    return letters, letters[:batch_ndim], letters[batch_ndim:][axis]


# Lower bound on the share of :func:`agreeing`: where momentum opposes nearly all of the gradient,
# division by the share would put a full step into a few entries.
SMALLEST_SHARE = 0.05


def agreeing(N: jax.Array, R: jax.Array, batch_ndim: int) -> tuple[jax.Array, jax.Array]:
    """The entries of N with the sign of the gradient R, and their share in each matrix.

    Entries are selected, because XLA may turn a product of NaN and zero into zero.
    """
    opposes = N * R <= 0
    share = jnp.mean(opposes, tuple(range(batch_ndim, N.ndim)), jnp.float32, keepdims=True)
    return jnp.where(opposes, 0.0, N), jnp.maximum(1 - share, SMALLEST_SHARE)
