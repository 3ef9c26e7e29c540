"""A new basis from a gradient: one matrix at a time, in float32.

Every method takes ``G`` (m, n), scaled so that its largest entry is one, and the previous
orthonormal basis ``P`` (m, r). It returns an orthonormal (m, r) basis of the dominant left subspace
of G, up to the method's accuracy. The right basis of G is the left basis of Gᵀ.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from natgalore_jax._src.kernels.orthonormal import (
    CONDITIONED,
    NEARLY,
    nearly_polar,
    order_weights,
    ordered_polar_factor,
    polar_factor,
    polished,
    shifted,
)
from natgalore_jax._src.kernels.projection import contract
from natgalore_jax._src.kernels.random import normal
from natgalore_jax._src.params.placement import place_like, replicated, vary, varying_axes

Method = Literal["power", "svd", "eigh", "randomized", "gaussian", "online"]
# Methods that call LAPACK, which may fail.
FACTORISING = ("svd", "eigh", "randomized")

# Power steps of a refresh from the previous basis and from a start; benchmarks.optimizer.refresh
# measures the share of the energy of the best basis that they capture on gradients of a model.
WARM_STEPS, COLD_STEPS = 5, 8
# Randomised SVD: columns beyond the rank, and power steps (Halko, Martinsson & Tropp 2011, §4.4).
OVERSAMPLING, SKETCH_STEPS = 8, 2
ONLINE_RATE = 0.1
# Norms of probes (random directions outside the basis) relative to its columns. Power steps damp
# weak directions, so that even a tenth costs less than 1e-5 of the energy of the best basis.
POWER_PROBE, ONLINE_PROBE = 0.1, 1e-4
# Methods whose only randomness is the probe. All matrices of a step share its key, so that a stack
# has the same bases as its matrices alone.
PROBED = ("power", "online")
# A basis restarts if it captures less energy of a gradient than this multiple of a random basis's.
# Oja's rule averages over gradients, and must not restart at every noisy gradient.
POWER_LOST, ONLINE_LOST = 1.0, 0.01
# 4-bit codes round the first column of the start by a tenth.
START_TOLERANCE = 0.15


def new_basis(
    method: str,
    G: jax.Array,
    P: jax.Array,
    key: jax.Array,
    is_first: jax.Array,
    is_right: bool = False,
) -> jax.Array:
    """The basis after a refresh.

    Args:
      method: a ``Method``.
      G: (m, n), :func:`is_usable`, any float dtype and scale. If its columns are sharded, methods
        sum arrays of the size of P over devices, "eigh" of the size of G Gᵀ; "svd" gathers G.
      P: (m, r), the previous basis, or any orthonormal start at the first refresh.
      key: for the random methods, and for the probes of "power" and "online".
      is_first: scalar boolean, whether P is only a start.
      is_right: whether G is the transpose of a gradient, which affects the signs of "svd" alone.

    Returns:
      (m, r) in the dtype of P; P itself where a factorisation fails.
    """
    P32, G32 = P.astype(jnp.float32), G.astype(jnp.float32)
    # Squares of entries beyond 1e19 overflow float32, and squares below 1e-19 underflow.
    G32 = G32 / jnp.max(jnp.abs(G32))
    with jax.default_matmul_precision("highest"):
        kernel = _svd_right if method == "svd" and is_right else _KERNELS[method]
        Q = kernel(G32, P32, key, is_first)
    # With few rows a basis may be the start by chance, and would count as a start for ever.
    Q = Q.at[:, 0].multiply(jnp.where(is_start(Q[:, 0]), -1.0, 1.0))
    if method in FACTORISING:
        Q = jnp.where(jnp.all(jnp.isfinite(Q)), Q, P32)
    return Q.astype(P.dtype)


def is_usable(G: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """Whether a gradient, or each matrix over ``axes`` of it, is finite and non-zero in float32.

    A basis of any other gradient would spoil the next ``update_interval`` steps. Subnormal numbers
    are zero, because XLA computes with them as with zero.
    """
    # Of integers: XLA's maximum of floats on CPUs may ignore a NaN. One reduction compiles faster
    # than two.
    magnitudes = jax.lax.bitcast_convert_type(jnp.abs(G.astype(jnp.float32)), jnp.int32)
    largest = jax.lax.bitcast_convert_type(jnp.max(magnitudes, axes), jnp.float32)
    return (largest >= jnp.finfo(jnp.float32).tiny) & jnp.isfinite(largest)


def start_basis(m: int, r: int) -> jax.Array:
    """The first r vectors of the discrete cosine transform, with hashed row signs.

    The first column is the signs over √m, by which :func:`is_start` recognises the start: the state
    needs no flag, also for bases in 4 or 8 bits. The closed form needs only a shape.

    Returns:
      (m, r) float32, orthonormal.
    """
    i, j = (jnp.arange(x, dtype=jnp.uint32) for x in (m, r))
    i, j = i[:, None], j[None, :]
    vectors = jnp.cos(_phase(i, j, m)) * jnp.sqrt(jnp.where(j == 0, jnp.float32(1), 2) / m)
    return vectors * _signs(m)[:, None]


def _phase(i: jax.Array, j: jax.Array, m: int) -> jax.Array:
    """π (2i + 1) j / 2m, reduced modulo 2π; uint32 to float32.

    The reduction is in integers, because the cosine of a large float32 loses its digits, and in two
    steps, because the product exceeds 2³² for a vocabulary of 262,144 rows at rank 8,192.
    """
    turn = jnp.uint32(4 * m)
    odd = 2 * i + 1
    coarse = jnp.mod(jnp.mod(64 * odd, turn) * (j // 64), turn)
    fine = jnp.mod(odd * jnp.mod(j, 64), turn)
    return jnp.mod(coarse + fine, turn).astype(jnp.float32) * (jnp.pi / (2 * m))


def _signs(m: int) -> jax.Array:
    """Pseudorandom signs: one bit of a hash of the index."""
    # The first signs of this bit differ, unlike the first singular vector of a constant gradient.
    bit = (_hash(jnp.arange(m, dtype=jnp.uint32)) >> 1) & 1
    return jnp.where(bit == 1, jnp.float32(1), -1)


def is_start(first_column: jax.Array, batch_ndim: int = 0) -> jax.Array:
    """Whether first columns are those of :func:`start_basis`, up to rounding.

    Args:
      first_column: batch + the axes of the mode.
      batch_ndim: the number of batch axes.

    Returns:
      Batch, bool. False for a mode of one row, whose basis is always ±1.
    """
    mode_shape = first_column.shape[batch_ndim:]
    m = math.prod(mode_shape)
    expected = jnp.broadcast_to((_signs(m) / m**0.5).reshape(mode_shape), first_column.shape)
    deviation = first_column.astype(jnp.float32) - place_like(expected, first_column)
    is_near = jnp.abs(deviation) < START_TOLERANCE / m**0.5
    return jnp.all(is_near, tuple(range(batch_ndim, first_column.ndim))) & (m > 1)


def _power(G, P, key, is_first):
    """Block power iteration ``P ← polar(G Gᵀ P)`` from the previous basis and a probe.

    The last step weights the columns, ``P ← polar(G Gᵀ P D)``, which turns them towards singular
    vectors.
    """
    P = P + POWER_PROBE * _probe(P, key)
    steps = jnp.where(is_first, COLD_STEPS, WARM_STEPS)
    least = _least_energy(G, POWER_LOST)

    def is_left(carry):
        i, steps, _ = carry
        return i < steps

    # One body for all steps, the first and the last included: the polar iteration takes most of
    # the compile time.
    def step(carry):
        i, steps, P = carry
        Z = contract("mn,mr->nr", G, P)
        steps = jnp.where((i == 0) & (_mean_energy(Z) < least), COLD_STEPS, steps)
        is_last = i + 1 == steps
        Y = shifted(_times(G, Z), P) * jnp.where(is_last, order_weights(P.shape[1]), 1.0)
        return i + 1, steps, nearly_polar(Y, jnp.where(is_last, NEARLY, CONDITIONED))

    start = (jnp.int32(0), vary(steps, varying_axes((G, P, is_first))), P)
    return polished(jax.lax.while_loop(is_left, step, start)[-1])


def _probe(P: jax.Array, key: jax.Array) -> jax.Array:
    """Random columns of about unit length, orthogonal to P.

    Products with ``G Gᵀ`` never leave an invariant subspace (the null space of Gᵀ, or weak singular
    vectors of a G whose dominant singular vectors are orthogonal to P), so that a warm start needs
    a component in every direction. Components inside P would rotate its columns.
    """
    W = _hashed(P.shape, jax.random.key_data(key)[-1]) / P.shape[0] ** 0.5
    return W - P @ (P.T @ W)


def _hashed(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Uniform pseudorandom entries with mean square 1, hashed from their indices.

    A counter-based generator for each parameter would take half of the compile time of the update.
    """
    i, j = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    x = _hash(_hash(i + seed.astype(jnp.uint32)) + j)
    return x.astype(jnp.float32) * (2 * 3**0.5 / 2**32) - 3**0.5


def _hash(x: jax.Array) -> jax.Array:
    """A mixing permutation of the 32-bit integers."""
    x = x * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def _mean_energy(Z: jax.Array) -> jax.Array:
    """``‖Z‖² / r``, of ``Z = GᵀP``."""
    return jnp.sum(Z * Z) / Z.shape[1]


def _least_energy(G: jax.Array, limit: float) -> jax.Array:
    """``limit ‖G‖² / m``, below which a basis is lost: a random one has ``‖G‖² / m``."""
    return limit * jnp.sum(G * G) / G.shape[0]


def _times(G: jax.Array, Z: jax.Array) -> jax.Array:
    """``G Z``, replicated."""
    return contract("mn,nr->mr", G, Z)


def _svd(G, P, key, is_first):
    """The left singular vectors: exact, and many times slower than a power step."""
    U, _, _ = jnp.linalg.svd(replicated(G), full_matrices=False)
    return U[:, : P.shape[1]]


def _svd_right(G, P, key, is_first):
    """The same vectors as right singular vectors of Gᵀ, with LAPACK's signs.

    GaLore keeps its moments at a refresh, so that published numbers depend on the signs.
    """
    _, _, Vt = jnp.linalg.svd(replicated(G).T, full_matrices=False)
    return Vt[: P.shape[1]].T


def _eigh(G, P, key, is_first):
    """The eigenvectors of ``G Gᵀ``: exact to the square root of float32's precision."""
    _, V = jnp.linalg.eigh(contract("mn,kn->mk", G, G, precision="highest"))
    return V[:, ::-1][:, : P.shape[1]]


def _orthonormal(Y: jax.Array) -> jax.Array:
    """``Y = QR`` with ``diag(R) > 0``.

    Without the sign rule the columns would flip at random from refresh to refresh; with it they
    move continuously, so that moments kept in the old coordinates stay meaningful.
    """
    Q, R = jnp.linalg.qr(Y)
    return Q * jnp.where(jnp.diagonal(R) < 0, -1.0, 1.0)


def _randomized(G, P, key, is_first):
    """Randomised SVD: a Gaussian sketch of the range, power steps, the SVD of a small matrix."""
    width = min(P.shape[1] + OVERSAMPLING, *G.shape)
    Q = _orthonormal(_times(G, normal(key, (G.shape[1], width))))
    for _ in range(SKETCH_STEPS):
        Q = _orthonormal(_times(G, contract("mn,mr->nr", G, Q)))
    sketch = replicated(contract("mw,mn->wn", Q, G, precision="highest"))
    U, _, _ = jnp.linalg.svd(sketch, full_matrices=False)
    return jnp.matmul(Q, U, precision="highest")[:, : P.shape[1]]


def _gaussian(G, P, key, is_first):
    """A random subspace, independent of the gradient."""
    # In shard_map the result must vary over the devices that P varies over: add a zero of P.
    return polar_factor(normal(key, P.shape) + 0 * P)


def _online(G, P, key, is_first):
    """Oja's rule ``P ← polar((P + η G Gᵀ (P + εΩ) / λ̄) D)``, λ̄ the mean of ``diag(Pᵀ G Gᵀ P)``.

    The rule amplifies the probe εΩ along dominant directions of G outside P, which are inside after
    some hundred steps. A basis that captures too little of G restarts with power steps.
    """
    Z = contract("mn,mr->nr", G, P + ONLINE_PROBE * _probe(P, key))

    mean_curvature = _mean_energy(Z)

    def oja():
        step = ONLINE_RATE / jnp.where(mean_curvature > 0, mean_curvature, 1.0)
        return ordered_polar_factor(P + step * _times(G, Z))

    is_lost = mean_curvature < _least_energy(G, ONLINE_LOST)
    return jax.lax.cond(is_first | is_lost, lambda: _power(G, P, key, True), oja)


_KERNELS: dict[str, Callable[..., jax.Array]] = {
    "power": _power,
    "svd": _svd,
    "eigh": _eigh,
    "randomized": _randomized,
    "gaussian": _gaussian,
    "online": _online,
}
