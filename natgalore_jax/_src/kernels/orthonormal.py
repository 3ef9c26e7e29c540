"""Orthonormal columns by matrix products, without LAPACK and on any sharding.

The polar factor ``Y (YᵀY)^(−1/2)`` is the orthonormal matrix nearest to Y, found by Newton–Schulz
iteration: with ``R = YᵀY / ‖YᵀY‖``, polynomials Z of R bring ``Z R Z`` to the identity, and their
product is the inverse square root. In float32 one pass brings singular values between 1e-3 and 1 to
one and multiplies smaller singular values by a thousand. Passes are repeated until the columns are
orthonormal.
"""

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.params.placement import vary, varying_axes

# δ, added to the normalised Gram matrix, whose float32 error is 1e-7: bounds the amplification of a
# pass by δ^(−1/2).
DAMPING = 1e-6
# The polynomials a x + b x³ + c x⁵ of a pass bring singular values of √δ to 1 to one, to 1e-9. Each
# is the best approximation of one, by its largest error, on the image of the interval before (Amsel
# et al., The Polar Express, 2025, arXiv 2505.16932).
QUINTICS = (
    (8.470328803848073, -25.108074706661885, 18.62927559911802),
    (4.182834183293943, -3.108701109889242, 0.5806066813500492),
    (3.9618572789615976, -2.9540637463593775, 0.5629761179538963),
    (3.2865862170279545, -2.4647201345312784, 0.5073576938614545),
    (2.2737499944340356, -1.6446603679080671, 0.4161909274978863),
    (1.888716197351829, -1.265157225338601, 0.37651892555749084),
    (1.8750008858926288, -1.2500009843581896, 0.3750000984658915),
)
# Each pass gains a factor of a thousand, and the smallest normal float32 is 1e-38.
MAX_PASSES = 12
# Tolerances on ‖XᵀX − I‖: before the next power step, and before one last quintic, whose error is
# 5/16 of the third power.
CONDITIONED, NEARLY = 0.5, 0.01
# Their limit on short intervals around one.
NEAR_ONE = (15 / 8, -10 / 8, 3 / 8)
# ε, the weight of the identity in a power step: ten times the rounding error of a product.
SHIFT = 1e-6
# The last of the weights D that order columns.
SMALLEST_WEIGHT = 1e-4


def polar_factor(Y: jax.Array) -> jax.Array:
    """``Y (YᵀY)^(−1/2)``: (m, r) float32 of full rank, to an error of about 1e-6 in ``XᵀX − I``."""
    return polished(nearly_polar(Y, NEARLY))


def ordered_polar_factor(Y: jax.Array) -> jax.Array:
    """``polar(Y D)`` with the weights of :func:`order_weights`, for ``Y = A P``.

    ``P ← polar(A P D)`` ascends ``tr(Pᵀ A P D)`` for a positive semidefinite A, whose maximum is
    the eigenvectors in the order of their eigenvalues (Brockett 1991). Without weights the columns
    are an arbitrary rotation of the eigenvectors; Adam, which scales each coordinate, learns better
    where coordinates are close to eigenvectors.
    """
    return polar_factor(Y * order_weights(Y.shape[1]))


def order_weights(r: int) -> jax.Array:
    """The diagonal of D: r weights that fall geometrically from 1."""
    return jnp.asarray(SMALLEST_WEIGHT ** (np.arange(r) / max(r - 1, 1)), jnp.float32)


def shifted(Y: jax.Array, P: jax.Array) -> jax.Array:
    """``Y / ‖Y‖ + ε P``, of full rank if P is and ``Y = A P`` with A positive semidefinite."""
    norm = jnp.linalg.norm(Y)
    return Y / jnp.where(norm > 0, norm, 1.0) + SHIFT * P


def nearly_polar(Y: jax.Array, tolerance: jax.typing.ArrayLike) -> jax.Array:
    """X with the polar factor of Y and ``‖XᵀX − I‖ ≤ tolerance``.

    A tolerance of ``CONDITIONED`` leaves singular values between 0.7 and 1.3, enough for a power
    step; ``NEARLY`` is for :func:`polished`.
    """

    def is_far(carry):
        _, S, count = carry
        return (count < MAX_PASSES) & (jnp.linalg.norm(S - _identity(S)) > tolerance)

    def one_pass(carry):
        X, S, count = carry
        X = _times(X, _inverse_root(S))
        return X, _gram(X), count + 1

    # Fourth powers of entries must not overflow float32.
    largest = jnp.max(jnp.abs(Y))
    Y = Y / jnp.where(largest > 0, largest, 1.0)
    return jax.lax.while_loop(is_far, one_pass, (Y, _gram(Y), jnp.int32(0)))[0]


def polished(X: jax.Array) -> jax.Array:
    """The polar factor of X with ``‖XᵀX − I‖ ≤ NEARLY``."""
    return _times(X, _quintic(jnp.asarray(NEAR_ONE, jnp.float32), _gram(X)))


def _inverse_root(S: jax.Array) -> jax.Array:
    """``(S + δ ‖S‖ I)^(−1/2)`` of a symmetric positive semidefinite matrix."""
    norm = jnp.linalg.norm(S)
    polynomials = jnp.asarray(QUINTICS, jnp.float32)

    def step(k, carry):
        root, R = carry
        Z = _quintic(polynomials[k], R)
        return _times(root, Z), _times(_times(R, Z), Z)

    start = (_identity(S), S / norm + DAMPING * _identity(S))
    return jax.lax.fori_loop(0, len(QUINTICS), step, start)[0] / jnp.sqrt(norm)


def _quintic(coefficients: jax.Array, R: jax.Array) -> jax.Array:
    """``a I + b R + c R²``, which maps singular values x to a x + b x³ + c x⁵ when applied."""
    a, b, c = coefficients
    return a * _identity(R) + b * R + c * _times(R, R)


def _identity(S: jax.Array) -> jax.Array:
    return vary(jnp.eye(S.shape[0], dtype=S.dtype), varying_axes(S))


def _gram(X: jax.Array) -> jax.Array:
    return _times(X.T, X)


def _times(A: jax.Array, B: jax.Array) -> jax.Array:
    return jnp.matmul(A, B, precision="highest")
