"""Orthonormal columns by matrix products, without LAPACK and on any sharding.

The polar factor ``Y (YᵀY)^(−1/2)`` is the orthonormal matrix nearest to Y, found by Newton–Schulz
iteration: with ``R = YᵀY / ‖YᵀY‖``, polynomials Z of R bring ``Z R Z`` to the identity, and their
product is the inverse square root. In float32 one pass brings singular values between 1e-3 and 1 to
one and multiplies smaller singular values by a thousand. Passes are repeated until the columns are
orthonormal.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.params.placement import vary, varying_axes

# δ, added to the normalised Gram matrix, whose float32 error is 1e-7: bounds the amplification of a
# pass by δ^(−1/2).
DAMPING = 1e-6
# Polynomials per pass: singular values of √δ and above become one to 1e-9.
QUINTICS = 7
# Each pass gains a factor of a thousand, and the smallest normal float32 is 1e-38.
MAX_PASSES = 12
# Tolerances on ‖XᵀX − I‖: before the next power step, and before one last quintic, whose error is
# 5/16 of the third power.
CONDITIONED, NEARLY = 0.5, 0.01
# The limit of minimax quintics on short intervals around one, where their equations are singular.
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
    polynomials = jnp.asarray(minimax_quintics(DAMPING**0.5, QUINTICS), jnp.float32)

    def step(k, carry):
        root, R = carry
        Z = _quintic(polynomials[k], R)
        return _times(root, Z), _times(_times(R, Z), Z)

    start = (_identity(S), S / norm + DAMPING * _identity(S))
    return jax.lax.fori_loop(0, QUINTICS, step, start)[0] / jnp.sqrt(norm)


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


@functools.cache
def minimax_quintics(smallest: float, count: int) -> tuple[tuple[float, float, float], ...]:
    """Odd quintics a x + b x³ + c x⁵ whose composition maps [smallest, 1] to one.

    Each is the minimax approximation of 1 on the image of the previous interval (Remez exchange).
    The greedy composition is optimal (Amsel et al., The Polar Express, 2025, arXiv 2505.16932).

    Args:
      smallest: above zero.
      count: number of polynomials.

    Returns:
      (a, b, c) of each, in the order of application.
    """
    low, high, found = smallest, 1.0, []
    for _ in range(count):
        coefficients, error = _minimax_quintic(low, high)
        found.append(coefficients)
        low, high = 1 - error, 1 + error
    return tuple(found)


def _minimax_quintic(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """The minimax odd quintic for 1 between two positive numbers, and its largest error."""
    if high - low < 1e-4:
        return NEAR_ONE, (high - low) ** 3
    inner = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(100):
        x = np.array([low, *inner, high])
        system = np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        # The extrema: a + 3 b x² + 5 c x⁴ = 0.
        root = np.sqrt(9 * b * b - 20 * a * c)
        last, inner = inner, tuple(np.sqrt((-3 * b + s * root) / (10 * c)) for s in (-1, 1))
        if np.allclose(last, inner, rtol=1e-14, atol=0):
            break
    return (float(a), float(b), float(c)), float(abs(error))
