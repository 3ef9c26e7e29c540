"""A new basis from a gradient: one matrix at a time, in float32.

Every function takes ``G`` (m, n), scaled so that its largest entry is one, and the previous basis
``P`` (m, r), orthonormal, and returns an orthonormal (m, r) basis of the dominant left subspace of
G, up to the method's accuracy. The right basis of G is the left basis of Gᵀ.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

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
from natgalore_jax._src.params.placement import place_like, replicated

Method = Literal["power", "svd", "eigh", "randomized", "gaussian", "online"]
METHODS = get_args(Method)
# Those that call LAPACK, which may fail.
FACTORISING = ("svd", "eigh", "randomized")

# Power steps of a refresh, from the previous basis and from none: benchmarks/optimizer/refresh.py
# shows what share of the energy of the best basis they capture on gradients of a real model.
WARM_STEPS, COLD_STEPS = 5, 8
# Randomised SVD: columns beyond the rank, and power steps (Halko, Martinsson & Tropp 2011, §4.4).
OVERSAMPLING, SKETCH_STEPS = 8, 2
ONLINE_RATE = 0.1
# Probes: random directions outside of the basis, relative to its own columns. Power steps damp what
# is weak in them, so that even a tenth costs less than 1e-5 of the energy of the best basis.
POWER_PROBE, ONLINE_PROBE = 0.1, 1e-4
# Methods that only start with something random. It is the same for all matrices of a step, so that
# a stack has the bases that its matrices have alone.
PROBED = ("power", "online")
# A basis is lost if it has less of a gradient than so many random ones: it starts anew. Oja's rule
# averages over gradients, and must not start anew at each that is mostly noise.
POWER_LOST, ONLINE_LOST = 1.0, 0.01
# Four bits round the first column of the start by a tenth.
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
      method: one of ``METHODS``.
      G: (m, n), :func:`is_usable`, any float dtype and scale; its columns may be divided over
        devices, which then exchange sums of the size of P or, for "eigh", of G Gᵀ. The exact SVD
        takes G whole.
      P: (m, r), the previous basis, or any orthonormal start at the first refresh.
      key: for the random methods, and for the probes of "power" and "online".
      is_first: scalar boolean, whether P is only a start.
      is_right: whether G is the transpose of a gradient whose right basis is wanted. It matters
        to the signs of "svd" alone.

    Returns:
      (m, r) in the dtype of P. It is P itself where a factorisation fails.
    """
    P32, G32 = P.astype(jnp.float32), G.astype(jnp.float32)
    # Squares of entries beyond 1e19 overflow float32, and those below 1e-19 vanish.
    G32 = G32 / jnp.max(jnp.abs(G32))
    with jax.default_matmul_precision("highest"):
        kernel = _svd_right if method == "svd" and is_right else _KERNELS[method]
        Q = kernel(G32, P32, key, is_first)
    if method in FACTORISING:
        Q = jnp.where(jnp.all(jnp.isfinite(Q)), Q, P32)
    return Q.astype(P.dtype)


def is_usable(G: jax.Array) -> jax.Array:
    """Whether a gradient is finite and not zero, so that it has dominant directions.

    One bad gradient must not spoil the next ``update_interval`` steps.
    """
    # Not by the maximum: XLA's on CPUs may pass over a NaN.
    return jnp.all(jnp.isfinite(G)) & jnp.any(G != 0)


def start_basis(m: int, r: int) -> jax.Array:
    """The first r vectors of the discrete cosine transform, their rows with signs of a hash.

    The first column is the signs over √m: no gradient has such a basis, so that :func:`is_start`
    recognises the start, without a flag in the state, also in few bits.

    Returns:
      (m, r) float32, orthonormal. A closed form, so that ``init`` costs nothing and needs only a
      shape.
    """
    i, j = (jnp.arange(x, dtype=jnp.uint32) for x in (m, r))
    i, j = i[:, None], j[None, :]
    vectors = jnp.cos(_phase(i, j, m)) * jnp.sqrt(jnp.where(j == 0, jnp.float32(1), 2) / m)
    return vectors * _signs(m)[:, None]


def _phase(i: jax.Array, j: jax.Array, m: int) -> jax.Array:
    """π (2i + 1) j / 2m, less whole turns; uint32 to float32.

    The turns are taken off in integers, because the cosine of a large float32 loses its digits, and
    in two steps, because the product passes 2³² in a vocabulary of 262,144 rows at rank 8,192.
    """
    turn = jnp.uint32(4 * m)
    odd = 2 * i + 1
    coarse = jnp.mod(jnp.mod(64 * odd, turn) * (j // 64), turn)
    fine = jnp.mod(odd * jnp.mod(j, 64), turn)
    return jnp.mod(coarse + fine, turn).astype(jnp.float32) * (jnp.pi / (2 * m))


def _signs(m: int) -> jax.Array:
    """1 and −1 without a pattern: a bit of a hash of the index."""
    # A bit whose first signs differ: a constant gradient has a constant first vector.
    bit = (_hash(jnp.arange(m, dtype=jnp.uint32)) >> 1) & 1
    return jnp.where(bit == 1, jnp.float32(1), -1)


def is_start(first_column: jax.Array, batch_ndim: int = 0) -> jax.Array:
    """Whether bases are those of :func:`start_basis`, by their first columns, up to rounding.

    Args:
      first_column: batch + the axes of the mode.
      batch_ndim: the number of batch axes.

    Returns:
      Batch, bool. False for a mode of one row: its basis is ±1 from the start.
    """
    mode_shape = first_column.shape[batch_ndim:]
    m = math.prod(mode_shape)
    expected = jnp.broadcast_to((_signs(m) / m**0.5).reshape(mode_shape), first_column.shape)
    deviation = first_column.astype(jnp.float32) - place_like(expected, first_column)
    is_near = jnp.abs(deviation) < START_TOLERANCE / m**0.5
    return jnp.all(is_near, tuple(range(batch_ndim, first_column.ndim))) & (m > 1)


def _power(G, P, key, is_first):
    """Block power iteration ``P ← polar(G Gᵀ P)`` from the previous basis and a probe.

    The last step weighs the columns, ``P ← polar(G Gᵀ P D)``, which turns them towards the single
    singular vectors.
    """
    P = P + POWER_PROBE * _probe(P, key)
    Z = contract("mn,mr->nr", G, P)
    steps = jnp.where(is_first | _is_lost(G, Z, POWER_LOST), COLD_STEPS, WARM_STEPS)

    def step(i, Y):
        # One program for all steps: the compiler takes most of its time for the iteration in it.
        is_last = i == steps - 1
        X, S = nearly_polar(
            Y * jnp.where(is_last, order_weights(Y.shape[1]), 1.0),
            jnp.where(is_last, NEARLY, CONDITIONED),
        )
        return jax.lax.cond(is_last, polished, lambda X, _: shifted(_times_gram(G, X), X), X, S)

    return jax.lax.fori_loop(0, steps, step, shifted(_times(G, Z), P))


def _probe(P: jax.Array, key: jax.Array) -> jax.Array:
    """Columns of about unit length, outside of P, with something of every direction.

    Products with ``G Gᵀ`` alone never leave an invariant subspace: the null space of Gᵀ, or weak
    singular vectors of a G whose dominant ones are orthogonal to P. A warm start needs something of
    every direction. What is inside of P is left out, because it would turn P's columns around.
    """
    W = _hashed(P.shape, jax.random.key_data(key)[-1]) / P.shape[0] ** 0.5
    return W - P @ (P.T @ W)


def _hashed(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Entries like random ones, uniform with mean square 1: a hash of their places.

    A probe needs no better ones, and a counter-based generator in the program of each parameter
    takes half of the time that the whole update compiles in.
    """
    i, j = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    x = _hash(_hash(i + seed.astype(jnp.uint32)) + j)
    return x.astype(jnp.float32) * (2 * 3**0.5 / 2**32) - 3**0.5


def _hash(x: jax.Array) -> jax.Array:
    """A well-mixed permutation of the 32-bit integers, of multiplications and shifts."""
    x = x * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def _is_lost(G: jax.Array, Z: jax.Array, limit: float) -> jax.Array:
    """Whether ``‖GᵀP‖² / r < limit ‖G‖² / m`` for ``Z = GᵀP``: a random P has ``‖G‖² / m``."""
    return jnp.sum(Z * Z) / Z.shape[1] < limit * jnp.sum(G * G) / G.shape[0]


def _times_gram(G: jax.Array, Y: jax.Array) -> jax.Array:
    """``G (Gᵀ Y)``, whole."""
    return _times(G, contract("mn,mr->nr", G, Y))


def _times(G: jax.Array, Z: jax.Array) -> jax.Array:
    """``G Z``, whole."""
    return contract("mn,nr->mr", G, Z)


def _svd(G, P, key, is_first):
    """The left singular vectors: exact, and many times slower than one power step."""
    U, _, _ = jnp.linalg.svd(replicated(G), full_matrices=False)
    return U[:, : P.shape[1]]


def _svd_right(G, P, key, is_first):
    """The same vectors as right ones of Gᵀ, because LAPACK signs those otherwise.

    GaLore keeps its moments when the vectors change, so that published numbers depend on signs.
    """
    _, _, Vt = jnp.linalg.svd(replicated(G).T, full_matrices=False)
    return Vt[: P.shape[1]].T


def _eigh(G, P, key, is_first):
    """The eigenvectors of ``G Gᵀ``: exact to the square root of float32's precision."""
    _, V = jnp.linalg.eigh(contract("mn,kn->mk", G, G))
    return V[:, ::-1][:, : P.shape[1]]


def _orthonormal(Y: jax.Array) -> jax.Array:
    """``Y = QR`` with ``diag(R) > 0``.

    Without the sign rule the columns flip at random from refresh to refresh; with it a warm
    refresh moves them continuously, so that moments kept in the old coordinates stay meaningful.
    """
    Q, R = jnp.linalg.qr(Y)
    return Q * jnp.where(jnp.diagonal(R) < 0, -1.0, 1.0)


def _randomized(G, P, key, is_first):
    """Randomised SVD: a Gaussian sketch of the range, power steps, the SVD of a small matrix."""
    width = min(P.shape[1] + OVERSAMPLING, *G.shape)
    Q = _orthonormal(_times(G, normal(key, (G.shape[1], width))))
    for _ in range(SKETCH_STEPS):
        Q = _orthonormal(_times_gram(G, Q))
    U, _, _ = jnp.linalg.svd(replicated(contract("mw,mn->wn", Q, G)), full_matrices=False)
    return (Q @ U)[:, : P.shape[1]]


def _gaussian(G, P, key, is_first):
    """A random subspace that does not look at the gradient."""
    return polar_factor(normal(key, P.shape))


def _online(G, P, key, is_first):
    """Oja's rule ``P ← polar((P + η G Gᵀ (P + εΩ) / λ̄) D)``, λ̄ the mean of ``diag(Pᵀ G Gᵀ P)``.

    The probe εΩ grows by the rule itself where G has more than P knows of: what dominates outside
    of P is inside after some hundred steps. A basis that is lost starts anew by power steps.
    """
    Z = contract("mn,mr->nr", G, P + ONLINE_PROBE * _probe(P, key))

    def oja():
        mean_curvature = jnp.sum(Z * Z) / Z.shape[1]
        step = ONLINE_RATE / jnp.where(mean_curvature > 0, mean_curvature, 1.0)
        return ordered_polar_factor(P + step * _times(G, Z))

    return jax.lax.cond(
        is_first | _is_lost(G, Z, ONLINE_LOST), lambda: _power(G, P, key, True), oja
    )


_KERNELS: dict[str, Callable[..., jax.Array]] = {
    "power": _power,
    "svd": _svd,
    "eigh": _eigh,
    "randomized": _randomized,
    "gaussian": _gaussian,
    "online": _online,
}
