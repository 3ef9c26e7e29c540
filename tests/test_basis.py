"""Bases against NumPy's float64 SVD. Subspaces are compared, never vectors: signs are arbitrary."""

import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import natgalore_jax as ng
from natgalore_jax._src.kernels.basis import WARM_STEPS, Method, _phase, new_basis, start_basis

KEY = jax.random.key(0)
METHODS = get_args(Method)
refresh = jax.jit(new_basis, static_argnums=0)


def spectrum(m, n, decay, seed=0):
    """A matrix with singular values k^-decay, in float64."""
    rng = np.random.default_rng(seed)
    U, _ = np.linalg.qr(rng.standard_normal((m, min(m, n))))
    V, _ = np.linalg.qr(rng.standard_normal((n, min(m, n))))
    return (U * np.arange(1, min(m, n) + 1.0) ** -decay) @ V.T


def energy(G, P):
    """The share of what the best basis of this rank captures."""
    best = np.sum(np.linalg.svd(G, compute_uv=False)[: P.shape[1]] ** 2)
    return np.sum((np.asarray(P, np.float64).T @ G) ** 2) / best


def projector(P):
    P = np.asarray(P, np.float64)
    return P @ P.T


def cold(method, G, r):
    return refresh(method, jnp.asarray(G, jnp.float32), start_basis(G.shape[0], r), KEY, True)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("method", METHODS)
def test_bases_are_orthonormal(method, shape):
    P = np.asarray(cold(method, spectrum(*shape, 0.5), 8), np.float64)
    np.testing.assert_allclose(P.T @ P, np.eye(8), atol=2e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("method", ["svd", "eigh"])
def test_exact_methods_span_the_dominant_subspace(method, shape):
    G = spectrum(*shape, 1.0)
    U, _, _ = np.linalg.svd(G)
    # eigh works with squared singular values, which halves the digits of small gaps.
    np.testing.assert_allclose(
        projector(cold(method, G, 6)), projector(U[:, :6]), atol={"svd": 1e-5, "eigh": 2e-4}[method]
    )


def test_randomized_svd_captures_nearly_all_energy():
    flat, steep = spectrum(48, 96, 0.5), spectrum(48, 96, 1.0)
    assert energy(flat, cold("randomized", flat, 12)) > 0.985
    assert energy(steep, cold("randomized", steep, 12)) > 0.9995


def test_warm_power_step_follows_a_drifting_gradient():
    G, N = spectrum(64, 96, 1.0, seed=1), spectrum(64, 96, 1.0, seed=2)
    P = cold("svd", np.cos(0.5) * G + np.sin(0.5) * N, 16)
    stale = energy(G, P)
    fresh = energy(G, refresh("power", jnp.asarray(G, jnp.float32), P, KEY, False))
    assert fresh > 0.995 > stale


def test_warm_power_step_moves_the_columns_continuously():
    G, N = spectrum(64, 96, 0.5, seed=1), spectrum(64, 96, 0.5, seed=2)
    P = cold("power", G, 16)
    for _ in range(10):
        P = refresh("power", jnp.asarray(G, jnp.float32), P, KEY, False)
    drifted = jnp.asarray(np.cos(0.1) * G + np.sin(0.1) * N, jnp.float32)
    C = np.asarray(refresh("power", drifted, P, KEY, False)).T @ np.asarray(P)
    assert np.all(np.diagonal(C) > 0)
    assert np.mean(np.diagonal(C)) > 0.97


def test_online_steps_turn_the_basis_towards_the_gradient():
    G = spectrum(48, 64, 0.5)
    P = refresh("gaussian", jnp.asarray(G, jnp.float32), start_basis(48, 8), KEY, False)
    energies = [energy(G, P)]
    for _ in range(60):
        P = refresh("online", jnp.asarray(G, jnp.float32), P, KEY, False)
        energies.append(energy(G, P))
    assert energies[0] < 0.6 and energies[-1] > 0.9
    assert all(b > a - 1e-4 for a, b in itertools.pairwise(energies))


@pytest.mark.parametrize("method", ["power", "svd", "eigh", "randomized", "online"])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e30])
def test_scale_of_the_gradient_does_not_matter(method, scale):
    G = spectrum(24, 40, 1.0)
    assert energy(G, cold(method, G * scale, 6)) > 0.99


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [0.0, 1e-39, np.nan, np.inf])
def test_zero_subnormal_and_non_finite_gradients_keep_the_basis(method, bad):
    interval = {} if method == "online" else {"update_interval": 1}
    tx = ng.chain(ng.low_rank_project(rank=6, method=method, **interval), ng.project_back())
    update, good = jax.jit(tx.update), spectrum(24, 40, 0.5)
    _, state = update({"w": jnp.asarray(good, jnp.float32)}, tx.init({"w": jnp.zeros((24, 40))}))
    G = bad * good if bad < 1 else np.where(np.arange(40) == 3, bad, good)
    _, kept = update({"w": jnp.asarray(G, jnp.float32)}, state)
    np.testing.assert_array_equal(kept[0].basis[0]["w"], state[0].basis[0]["w"])


@pytest.mark.parametrize("method", METHODS)
def test_rank_deficient_gradients_still_give_an_orthonormal_basis(method):
    rng = np.random.default_rng(0)
    G = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 40))
    P = np.asarray(cold(method, G, 6), np.float64)
    np.testing.assert_allclose(P.T @ P, np.eye(6), atol=1e-5)
    if method != "gaussian":
        assert energy(G, P) > 0.999


def test_bfloat16_gradients_and_bases():
    G = spectrum(24, 40, 1.0)
    P = refresh(
        "power", jnp.asarray(G, jnp.bfloat16), start_basis(24, 6).astype(jnp.bfloat16), KEY, True
    )
    assert P.dtype == jnp.bfloat16
    assert energy(G, P.astype(jnp.float32)) > 0.99


@pytest.mark.parametrize(("m", "r"), [(7, 3), (262_144, 8192), (1_000_003, 5000)])
def test_start_basis_of_long_axes_has_the_phases_of_whole_numbers(m, r):
    i, j = np.array([0, 1, m // 3, m - 1])[:, None], np.array([0, 1, r // 2, r - 1])[None]
    exact = ((2 * i + 1) * j % (4 * m)) * (np.pi / (2 * m))
    ours = _phase(jnp.asarray(i, jnp.uint32), jnp.asarray(j, jnp.uint32), m)
    np.testing.assert_allclose(ours, exact, atol=1e-6)


@pytest.mark.parametrize("m,r", [(5, 5), (64, 16), (1000, 7), (11008, 3)])
def test_start_basis_is_orthonormal(m, r):
    P = np.asarray(start_basis(m, r), np.float64)
    np.testing.assert_allclose(P.T @ P, np.eye(r), atol=2e-5)


def in_block(A, row, column, shape=(64, 96)):
    out = np.zeros(shape)
    out[row : row + A.shape[0], column : column + A.shape[1]] = A
    return out


def left_vectors(G, r):
    return jnp.asarray(np.linalg.svd(G)[0][:, :r], jnp.float32)


NOISE = np.random.default_rng(7).standard_normal((32, 48))
TRAPS = {
    # Other rows are active than before: GᵀP is zero.
    "other rows": (in_block(spectrum(32, 48, 0.5, 1), 0, 0), in_block(NOISE, 32, 0)),
    "few rows": (in_block(spectrum(32, 48, 0.5, 1), 0, 0), in_block(NOISE[:5], 50, 0)),
    "one row": (in_block(spectrum(32, 48, 0.5, 1), 0, 0), in_block(NOISE[:1], 63, 0)),
    # What is inside of P is weak and invariant, what dominates is outside.
    **{
        f"a block {ratio} times as strong": (
            in_block(spectrum(32, 48, 0.5, 1), 0, 0),
            in_block(spectrum(32, 48, 0.5, 1), 0, 0)
            + ratio * in_block(spectrum(32, 48, 0.5, 2), 32, 48),
        )
        for ratio in (1.2, 2.0, 10.0)
    },
}


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
@pytest.mark.parametrize("trap", TRAPS)
def test_no_subspace_is_a_trap_for_power(trap, rounding):
    """Products with G Gᵀ alone stay in these subspaces for ever, or for hundreds of refreshes."""
    before, G = TRAPS[trap]
    P = left_vectors(before, 8)
    P = P + rounding * jax.random.normal(KEY, P.shape)
    for i in range(2):
        P = refresh("power", jnp.asarray(G, jnp.float32), P, jax.random.fold_in(KEY, i), False)
    np.testing.assert_allclose(P.T @ P, np.eye(8), atol=2e-6)
    assert energy(G, P) > 0.99


@pytest.mark.parametrize(
    "trap,steps,share",
    [
        ("few rows", 1, 0.999),
        ("one row", 1, 0.999),
        ("other rows", 1, 0.95),  # what power steps from a random start find in white noise
        ("a block 10.0 times as strong", 100, 0.9),
        ("a block 2.0 times as strong", 200, 0.9),
    ],
)
def test_no_subspace_is_a_trap_for_online(trap, steps, share):
    before, G = TRAPS[trap]
    P = left_vectors(before, 8)
    for i in range(steps):
        P = refresh("online", jnp.asarray(G, jnp.float32), P, jax.random.fold_in(KEY, i), False)
    assert energy(G, P) > share


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_probe_costs_no_energy_and_turns_no_column(decay):
    """Against the power steps without a probe, in float64, warm from the same spectrum."""
    G, N = spectrum(64, 96, decay, 3), spectrum(64, 96, decay, 4)
    P = np.linalg.svd(G)[0][:, :16]
    drifted = np.cos(0.1) * G + np.sin(0.1) * N
    expected = P
    for _ in range(WARM_STEPS):
        Q, R = np.linalg.qr(drifted @ (drifted.T @ expected))
        expected = Q * np.sign(np.diag(R))
    found = refresh("power", jnp.asarray(drifted, jnp.float32), jnp.asarray(P), KEY, False)
    assert energy(drifted, found) > energy(drifted, expected) - 1e-4
    kept = refresh("power", jnp.asarray(G, jnp.float32), jnp.asarray(P, jnp.float32), KEY, False)
    # Vectors with less than 1e-5 of the energy of the first are lost in rounding.
    seen = np.arange(1, 17.0) ** (-2 * decay) > 1e-4
    assert np.all(np.diagonal(np.asarray(kept).T @ P)[seen] > 0.98)
