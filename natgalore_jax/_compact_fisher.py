"""A Fisher matrix of low-rank gradients that needs r² numbers: one factor for each projected axis.

Shapes: B are the batch axes of the parameter, K the axes of one low-rank gradient R. Formulas are
for one matrix projected on its left side, R (r, n), with one factor A (r, r).
"""

import dataclasses
import string
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from natgalore_jax._contract import contract


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FisherFactor:
    """The factor A of one axis, as a companion of the basis of that axis."""

    value: jax.Array
    axis: int = dataclasses.field(metadata={"static": True})

    def moved(self, transition: str, C_of_axis: Mapping[int, jax.Array]) -> "FisherFactor":
        """``A' = C A Cᵀ + (I − C Cᵀ) tr(A) / r``: what was never seen takes the mean."""
        if transition == "reset":
            return dataclasses.replace(self, value=jnp.zeros_like(self.value))
        A, C = self.value, C_of_axis[self.axis]
        r = A.shape[0]
        unseen = jnp.eye(r) - jnp.matmul(C, C.T, precision="highest")
        moved = jnp.matmul(C, jnp.matmul(A, C.T, precision="highest"), precision="highest")
        return dataclasses.replace(self, value=moved + unseen * (jnp.trace(A) / r))


def gram(R: jax.Array, axis: int, batch_ndim: int) -> jax.Array:
    """``R Rᵀ`` over all axes of K but ``axis``, in float32: B + (r, r)."""
    letters = string.ascii_lowercase[: R.ndim]
    a, batch = letters[batch_ndim:][axis], letters[:batch_ndim]
    R = R.astype(jnp.float32)
    return contract(f"{letters},{letters.replace(a, a.upper())}->{batch}{a}{a.upper()}", R, R)


def averaged(A: jax.Array, new: jax.Array, decay: jax.typing.ArrayLike) -> jax.Array:
    """``β A + (1 − β) A'``, from the first A' on at full size; one that is not finite is dropped."""
    is_empty = (jnp.trace(A, axis1=-2, axis2=-1) == 0)[..., None, None]
    is_sound = jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True)
    return jnp.where(is_sound, jnp.where(is_empty, new, decay * A + (1 - decay) * new), A)


def damped(A: jax.Array, damping: jax.typing.ArrayLike, relative: bool) -> jax.Array:
    """``A + λ I``, with λ = ρ tr(A) / r if relative; the identity where that is zero."""
    r = A.shape[-1]
    shift = jnp.asarray(damping, jnp.float32)
    if relative:
        shift = shift * jnp.trace(A, axis1=-2, axis2=-1)[..., None, None] / r
    A = A + shift * jnp.eye(r)
    is_zero = jnp.all(A == 0, axis=(-2, -1), keepdims=True)
    return jnp.where(is_zero, jnp.eye(r), A)


def power(A: jax.Array, exponent: float) -> jax.Array:
    """``A^p`` of positive definite matrices, p < 0, up to a factor for each matrix."""
    # Powers of numbers near one: squares of gradients can be too small for float32 otherwise.
    A = A / jnp.max(jnp.abs(A), axis=(-2, -1), keepdims=True)
    if exponent == -1.0:
        L = jnp.linalg.cholesky(A)
        half = jax.scipy.linalg.solve_triangular(
            L, jnp.broadcast_to(jnp.eye(A.shape[-1]), A.shape), lower=True
        )
        return jnp.matmul(jnp.swapaxes(half, -1, -2), half, precision="highest")
    w, U = jnp.linalg.eigh(A)
    w = jnp.maximum(w, jnp.finfo(jnp.float32).eps * w[..., -1:])
    return jnp.matmul(
        U * jnp.power(w, exponent)[..., None, :], jnp.swapaxes(U, -1, -2), precision="highest"
    )


def multiply(W: jax.Array, N: jax.Array, axis: int, batch_ndim: int) -> jax.Array:
    """``W N`` along one axis of K; W is B + (r, r)."""
    letters = string.ascii_lowercase[: N.ndim]
    a, batch = letters[batch_ndim:][axis], letters[:batch_ndim]
    return contract(f"{batch}{a.upper()}{a},{letters}->{letters.replace(a, a.upper())}", W, N)


def with_norm_of(target: jax.Array, N: jax.Array, batch_ndim: int) -> jax.Array:
    """N with the norm that each matrix of ``target`` has."""
    axes = tuple(range(batch_ndim, N.ndim))
    size, wanted = (jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (N, target))
    return N * (wanted / jnp.where(size > 0, size, 1.0))
