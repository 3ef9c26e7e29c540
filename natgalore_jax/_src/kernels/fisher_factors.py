"""A Fisher matrix of low-rank gradients in r or r² numbers: one factor for each projected side.

Shapes: B are the batch axes of the parameter, F those of a factor: (r,) if it is diagonal, (r, r)
if it is full. Formulas are for one matrix projected on its left side, R (r, n).
"""

import string

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.projection import contract
from natgalore_jax._src.kernels.rotation import rotate_second_moment

_TINY = float(jnp.finfo(jnp.float32).tiny)


def moved_factor(A: jax.Array, C: jax.Array) -> jax.Array:
    """``A' = C A Cᵀ + (I − C Cᵀ) tr(A) / r``, or its diagonal for a diagonal A.

    What a new direction has outside the old basis was never seen and takes the mean.
    """
    if A.ndim == 1:
        return rotate_second_moment(A, {0: C})
    r = A.shape[0]
    unseen = jnp.eye(r, dtype=C.dtype) - jnp.matmul(C, C.T, precision="highest")
    moved = jnp.matmul(C, jnp.matmul(A, C.T, precision="highest"), precision="highest")
    return moved + unseen * (jnp.trace(A) / r)


def gram(R: jax.Array, axis: int, batch_ndim: int, *, diagonal: bool) -> jax.Array:
    """``R Rᵀ`` over all axes of a gradient but ``axis``, or its diagonal, in float32: B + F."""
    letters = string.ascii_lowercase[: R.ndim]
    a, batch = letters[batch_ndim:][axis], letters[:batch_ndim]
    R = R.astype(jnp.float32)
    if diagonal:
        return contract(f"{letters},{letters}->{batch}{a}", R, R)
    subscripts = f"{letters},{letters.replace(a, a.upper())}->{batch}{a}{a.upper()}"
    return contract(subscripts, R, R, precision="highest")


def averaged(
    A: jax.Array, new: jax.Array, decay: jax.typing.ArrayLike, batch_ndim: int
) -> jax.Array:
    """``β A + (1 − β) A'``, from the first A' on; a non-finite A' is skipped."""
    own = tuple(range(batch_ndim, A.ndim))
    is_empty = jnp.sum(jnp.abs(A), own, keepdims=True) == 0
    is_sound = jnp.isfinite(jnp.sum(new, own, keepdims=True))
    return jnp.where(is_sound, new + jnp.where(is_empty, 0.0, decay) * (A - new), A)


def inverse_power(
    A: jax.Array,
    damping: jax.typing.ArrayLike,
    exponent: float,
    batch_ndim: int,
    *,
    relative: bool,
) -> jax.Array:
    """``(A + λ I)^p`` for p < 0, up to a factor for each matrix, with λ = ρ tr(A) / r if relative.

    The identity, up to a factor, where A and λ are zero. Eigenvalues of a full A + λ I are raised
    to 4 eps tr(A), the accuracy to which they are known.
    """
    diagonal = A.ndim == batch_ndim + 1
    trace = jnp.sum(A, -1) if diagonal else jnp.trace(A, axis1=-2, axis2=-1)
    mean = (trace / A.shape[-1])[..., None]
    # Powers of numbers near one: squares of gradients can be too small for float32 otherwise.
    unit = jnp.where(mean > 0, mean, 1.0)
    shift = jnp.asarray(damping, jnp.float32)
    if not relative:
        shift = shift / unit
    if diagonal:
        # Of an empty A with λ = 0 any multiple of the identity will do.
        return jnp.power(jnp.maximum(A / unit + shift, _TINY), exponent)
    w, U = jnp.linalg.eigh(A / unit[..., None])
    # The eigenvalues sum to r and are off by r eps. A smaller λ would let p amplify the differences
    # between rounding errors: eigenvalues below a few r eps are taken to be equal.
    rounding = 4 * A.shape[-1] * jnp.finfo(jnp.float32).eps
    w = jnp.maximum(jnp.where(mean > 0, w, 1.0) + shift, rounding)
    return jnp.matmul(
        U * jnp.power(w, exponent)[..., None, :], jnp.swapaxes(U, -1, -2), precision="highest"
    )


def multiply(W: jax.Array, N: jax.Array, axis: int, batch_ndim: int) -> jax.Array:
    """``W N`` along one axis of N; W is B + F."""
    letters = string.ascii_lowercase[: N.ndim]
    a, batch = letters[batch_ndim:][axis], letters[:batch_ndim]
    if W.ndim == batch_ndim + 1:
        return contract(f"{batch}{a},{letters}->{letters}", W, N)
    return contract(f"{batch}{a.upper()}{a},{letters}->{letters.replace(a, a.upper())}", W, N)


def norm_ratio(target: jax.Array, N: jax.Array, batch_ndim: int) -> jax.Array:
    """``‖target‖ / ‖N‖`` of each matrix, and 0 of a matrix N that is zero."""
    axes = tuple(range(batch_ndim, N.ndim))
    wanted, size = (jnp.sum(jnp.square(x), axes, keepdims=True) for x in (target, N))
    return jnp.sqrt(wanted / jnp.where(size > 0, size, jnp.inf))


# The smallest share of entries that :func:`agreeing` makes up for: a matrix whose momentum points
# against the gradient nearly everywhere takes a small step, not one blown up in a few entries.
SMALLEST_SHARE = 0.05


def agreeing(N: jax.Array, R: jax.Array, batch_ndim: int) -> tuple[jax.Array, jax.Array]:
    """The entries of N with the sign of the gradient R, and the share of them in each matrix.

    A NaN in either stays: times zero it would be a NaN or a zero, as the compiler likes.
    """
    opposes = N * R <= 0
    share = jnp.mean(opposes, tuple(range(batch_ndim, N.ndim)), jnp.float32, keepdims=True)
    return jnp.where(opposes, 0.0, N), jnp.maximum(1 - share, SMALLEST_SHARE)
