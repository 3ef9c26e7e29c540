"""The leading singular values of an update: found by block power iteration, and clipped."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from natgalore_jax._src.kernels.dither import STRIDES, dither
from natgalore_jax._src.kernels.factored_update import (
    FactoredUpdate,
    PhiAxes,
    on_axes_of_gradient,
    place_update,
    side_axes,
    sum_for_phi,
)
from natgalore_jax._src.kernels.projection import Factors, Letters, contract
from natgalore_jax._src.kernels.stacks import Apart, any_of, read
from natgalore_jax._src.params.placement import place_factor, place_low_rank
from natgalore_jax._src.params.plan import LeafPlan

# Divisors are at least the smallest normal number.
_TINY = float(jnp.finfo(jnp.float32).tiny)
# Each reads the update twice. In AdamW's training at nano, σ₁ of a step's updates is too small by
# 6 to 35 % after one in the median, after two by 0 to 8 %, after three by 0 to 3 %, after four by 0
# to 1 %.
_ITERATIONS = 4
# Of a column of length one, in Gram–Schmidt: a hundred times its rounding errors.
_LEFT = 1e-5


def clip_each(settings: tuple[LeafPlan, int], operands: tuple[jax.Array], limit):
    """:func:`clip_leading` of one parameter, in a tuple."""
    plan, count = settings
    return (clip_leading(plan, *operands, limit, count),)


def clip_leading(
    plan: LeafPlan, U: jax.Array, limit: jax.typing.ArrayLike, count: int
) -> jax.Array:
    """``U − Σᵢ (1 − c √max(m, n) / σᵢ)₊ xᵢ xᵢᵀ U`` with ``X = (U Uᵀ)⁴ S``, ``σᵢ = ‖Uᵀxᵢ‖``.

    Four power iterations from fixed random numbers S, with columns that are made orthonormal in
    their order: exact for a rank up to ``count``. Otherwise σᵢ are too small, the more so the
    nearer the next singular value is. It is a contraction whatever the orthonormal X are, so that
    no singular value grows.

    Args:
      plan: of matrices.
      U: of any size; sums of its rows and columns must be finite.
      limit: c.
      count: columns of X; those of a matrix with fewer rows or columns are as many as these.
    """
    dtype, index, nb = U.dtype, Letters(plan), len(plan.batch)
    # Computed once: each reading of U would repeat what U is made of.
    U = jax.lax.optimization_barrier(U)
    U = U.astype(jnp.promote_types(dtype, jnp.float32))  # float64 stays: most pass unchanged
    rows, cols = (f"{index.batch}{side}" for side in index.modes)

    def of_rows(Y):  # U Y
        return _product(f"{cols}K,{index.full}->{rows}K", Y, U)

    def of_cols(X):  # Uᵀ X
        return _product(f"{rows}K,{index.full}->{cols}K", X, U)

    X = _start(plan, 0, count, U).astype(U.dtype)
    for _ in range(_ITERATIONS):
        Y = of_cols(X)
        X = of_rows(Y / _magnitude(Y, nb))
        X = _orthonormal(X / _magnitude(X, nb), nb)
    for x, y in _excess(plan, 0, X, of_cols(X), limit):
        U = U - x * y
    return U.astype(dtype)


def clip_leading_of_factored(
    plan: LeafPlan,
    factors: Factors,
    update: FactoredUpdate,
    inside: jax.Array,
    G: jax.Array | Apart,
    limit: jax.typing.ArrayLike,
    count: int,
) -> FactoredUpdate:
    """:func:`clip_leading` of ``U = P L + φ G``, which is not computed, from another start.

    With the projected side as rows, ``X = U K`` and ``K = T + AᵀW`` with fixed random numbers T,
    W = A T with orthonormal columns, and the columns of both terms of norms near one, so that G is
    read twice. ``A = PᵀU + φ PᵀG`` has the leading directions of U inside the subspace, and of
    those outside the ones that G has inside too; T is for the others.

    Args:
      plan, factors, update, G: of a matrix with one projected side; G only has to be read.
      inside: PᵀU.
      limit: c.
      count: columns of X; those of a matrix with fewer rows or columns are as many as these.
    """
    (mode,), nb = plan.projected_modes, len(plan.batch)
    like, index, (P,) = any_of(G), Letters(plan), factors
    projected, kept = (index.batch + index.modes[side] for side in (mode, 1 - mode))
    of_low, rank = index.arranged([mode]), index.batch + index.ranks[mode]
    update = place_update(plan, update, like)
    L, phi = update.low.astype(jnp.float32), update.phi
    of_phi = None if phi is None else phi[..., None]

    def with_G(subscripts, x):
        if like.dtype == jnp.bfloat16:  # So that G is not converted.
            x = x.astype(like.dtype)
        return read(lambda G, x: _product(subscripts, x, G), G, x)

    def with_kept(K):  # U K
        z = _product(f"{kept}K,{of_low}->{rank}K", K, L)
        X = _product(f"{rank}K,{index.factor(mode)}->{projected}K", z, P)
        if of_phi is None:
            return X
        return X + with_G(f"{kept}K,{index.full}->{projected}K", of_phi * K)

    def with_projected(X):  # Uᵀ X
        z = _product(f"{projected}K,{index.factor(mode)}->{rank}K", X, P)
        Y = _product(f"{rank}K,{of_low}->{kept}K", z, L)
        if of_phi is None:
            return Y
        return Y + of_phi * with_G(f"{projected}K,{index.full}->{kept}K", X)

    A = 2 * place_low_rank(plan, inside, like) - update.low  # L = PᵀU − φ PᵀG
    A = A / _magnitude_of(A, range(nb, A.ndim))
    T = _start(plan, 1 - mode, count, like) * math.sqrt(3 / plan.mode_sizes[1 - mode])
    W = _orthonormal(_product(f"{kept}K,{of_low}->{rank}K", T, A), nb)
    V = _product(f"{rank}K,{of_low}->{kept}K", W, A)
    X = with_kept(T + V / _norm(V, nb))
    X = _orthonormal(X / _magnitude(X, nb), nb)
    return update._replace(clipped=_excess(plan, mode, X, with_projected(X), limit))


def _product(subscripts: str, vectors: jax.Array, matrix: jax.Array) -> jax.Array:
    """``einsum`` in float32, for one vector as a sum.

    On CPUs each product with a vector is code of its own, with 20 to 35 ms of compile time, and no
    faster than a sum whose operands are computed before.
    """
    dtype = jnp.promote_types(jnp.result_type(vectors, matrix), jnp.float32)
    if vectors.shape[-1] > 1:
        highest = jax.lax.Precision.HIGHEST
        return contract(subscripts, vectors, matrix, dtype=dtype, precision=highest)
    of_vectors, of_matrix, out = subscripts.replace("->", ",").split(",")
    vectors, matrix = jax.lax.optimization_barrier((vectors, matrix))

    def axes(letters: str) -> PhiAxes:
        owners = tuple(map(of_matrix.index, letters[:-1]))
        full = tuple(a for a in range(matrix.ndim) if a not in owners)
        return PhiAxes(owners, (), full, len(set(of_vectors[:-1]) & set(out)))

    entries = on_axes_of_gradient(axes(of_vectors), vectors[..., 0]) * matrix.astype(dtype)
    return sum_for_phi(axes(out), entries)[..., None]


def _start(plan: LeafPlan, mode: int, count: int, like: jax.Array) -> jax.Array:
    """Fixed random numbers: ``count`` vectors of rows (mode 0) or columns of each matrix.

    Uniform numbers, not signs, whose sum may be zero: they would miss a column of ones.
    """
    count = min(count, *plan.mode_sizes)
    bits = dither((plan.mode_sizes[mode], count), 0, 0, STRIDES[0], first=0)
    S = (bits.astype(jnp.float32) / 2.0**31 - 1.0).reshape((*plan.mode_shape(mode), count))
    return place_factor(
        plan, mode, jnp.broadcast_to(S, (*plan.batch_shape, *S.shape)), like, stored=False
    )


def _orthonormal(X: jax.Array, nb: int) -> jax.Array:
    """Columns made orthonormal in their order: Gram–Schmidt, twice. Squares must not overflow.

    A column of which nearly nothing is left is zero: rounding errors may point along the others.
    """
    count = X.shape[-1]
    number = jnp.arange(count)
    X = X / _norm(X, nb)

    def subtract(i, X):
        is_next = number == i % count
        x = jnp.sum(jnp.where(is_next, X, 0.0), -1, keepdims=True)
        norm = _norm(x, nb)
        x = jnp.where(norm < _LEFT, 0.0, x / norm)
        along = jnp.sum(x * X, range(nb, X.ndim - 1), keepdims=True)
        return jnp.where(is_next, x, X - jnp.where(number > i % count, along, 0.0) * x)

    return jax.lax.fori_loop(0, 2 * count, subtract, X) if count > 1 else X


def _norm(X: jax.Array, nb: int) -> jax.Array:
    """Norms of columns, of entries whose squares do not overflow."""
    squares = jnp.sum(jnp.square(X), range(nb, X.ndim - 1), keepdims=True)
    return jnp.sqrt(jnp.maximum(squares, _TINY))


def _magnitude(X: jax.Array, nb: int) -> jax.Array:
    """Powers of two near the largest entries of columns, their units in what follows.

    Numbers have the same digits in any unit that is a power of two.
    """
    return _magnitude_of(X, range(nb, X.ndim - 1))


def _magnitude_of(X: jax.Array, axes: Sequence[int]) -> jax.Array:
    info = jnp.finfo(X.dtype)
    largest = jnp.max(jnp.abs(X), axes, keepdims=True)
    # Halved, because rounding up could overflow. The results do not depend on the power.
    power = jax.lax.reduce_precision(largest / 2, info.nexp, 0)
    return jax.lax.stop_gradient(jnp.maximum(power, float(info.tiny)))


def _as_columns_of(X: jax.Array, numbers: jax.Array, nb: int) -> jax.Array:
    """Numbers of the columns of another array, with the axes of X."""
    own = jnp.squeeze(numbers, range(nb, numbers.ndim - 1))
    return jnp.expand_dims(own, range(nb, X.ndim - 1))


def _excess(
    plan: LeafPlan, mode: int, X: jax.Array, Y: jax.Array, limit: jax.typing.ArrayLike
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Pairs ``(1 − c √max(m, n) / σ)₊ x`` and y, with ``σ = ‖y‖``.

    Args:
      X, Y: orthonormal vectors of one mode and their products with U, vectors of the other.
    """
    nb, bound = len(plan.batch), limit * math.sqrt(max(plan.mode_sizes))
    unit = _magnitude(Y, nb)
    sigma = unit * _norm(Y / unit, nb)
    share = jnp.where(sigma > bound, 1.0 - bound / sigma, 0.0)
    X = _as_columns_of(X, share, nb) * X
    of_X, of_Y = side_axes(plan, mode), side_axes(plan, 1 - mode)
    return tuple(
        (on_axes_of_gradient(of_X, X[..., i]), on_axes_of_gradient(of_Y, Y[..., i]))
        for i in range(X.shape[-1])
    )
