"""The natural gradient against a dense float64 solve of the full Fisher matrix."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import updates_of

import natgalore_jax as ng


def dense_natural_gradient(seen, length, damping, relative=False):
    """``(λI + Σ h hᵀ)⁻¹ h_t`` in float64, through the k × k matrix."""
    H = np.stack([np.asarray(h, np.float64).ravel() for h in seen[-length:]], axis=1)
    h = H[:, -1]
    lam = damping * np.sum(H * H) / H.shape[1] if relative else damping
    if lam == 0:
        return np.zeros_like(h)
    return np.linalg.solve(lam * np.eye(len(h)) + H @ H.T, h)


def run(gradients, **settings):
    """The natural gradient after each of the gradients, one matrix, outside of a subspace."""
    tx = ng.woodbury_natural_gradient(**{"damping_mode": "absolute"} | settings)
    updates, _ = updates_of(tx, [jnp.asarray(g) for g in gradients])
    return [np.asarray(u, np.float64) for u in updates]


def assert_matches(gradients, length, damping, *, relative=False, rtol=1e-5):
    mode = "relative" if relative else "absolute"
    results = run(gradients, history=length, damping=damping, damping_mode=mode)
    for t, got in enumerate(results):
        want = dense_natural_gradient(gradients[: t + 1], length, damping, relative)
        error = np.linalg.norm(got.ravel() - want)
        assert error <= rtol * np.linalg.norm(want), (t, error / np.linalg.norm(want))


def normals(count, shape=(6, 9), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("ratio", [1e-2, 1.0, 1e3, 1e7])
@pytest.mark.parametrize("length", [1, 4, 10])
def test_equals_dense_solve_from_the_first_gradient_to_a_full_ring(ratio, length):
    gradients = normals(2 * length + 1)
    largest = max(np.sum(g * g) for g in gradients) * 1.5
    assert_matches(gradients, length, float(largest / ratio))


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e7])
def test_equals_dense_solve_with_repeated_gradients(ratio):
    a, b, c = normals(3)
    gradients = [a, a, b, a, a, a, c, b, b, a]
    assert_matches(gradients, 5, float(5 * np.sum(a * a) / ratio))


@pytest.mark.parametrize("ratio", [1.0, 1e7])
def test_equals_dense_solve_with_zero_gradients(ratio):
    a, b, c = normals(3)
    zero = np.zeros_like(a)
    gradients = [zero, zero, a, zero, b, c, zero, a]
    assert_matches(gradients, 4, float(np.sum(a * a) / ratio))
    assert_matches(gradients, 4, 0.3, relative=True)


@pytest.mark.parametrize("ratio", [1e3, 1e7])
def test_equals_dense_solve_when_norms_span_four_decades(ratio):
    gradients = [
        g * np.float32(10.0**e)
        for g, e in zip(normals(9), [0, -4, 1, -2, 0, -3, -4, 0, 2], strict=True)
    ]
    largest = max(np.sum(g * g) for g in gradients)
    assert_matches(gradients, 4, float(largest / ratio))


@pytest.mark.parametrize("rho", [1e-6, 0.1, 1.0, 30.0])
def test_relative_damping_equals_dense_solve_and_ignores_the_scale_of_the_loss(rho):
    gradients = normals(7)
    assert_matches(gradients, 4, rho, relative=True)
    plain = run(gradients, history=4, damping=rho, damping_mode="relative")
    scaled = run([g * 1024 for g in gradients], history=4, damping=rho, damping_mode="relative")
    for p, q in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(q * 1024, p, rtol=1e-5)


def test_bfloat16_gradients_are_solved_in_float32():
    gradients = [jnp.asarray(g, jnp.bfloat16) for g in normals(6)]
    results = run(gradients, history=4, damping=0.5)
    for t, got in enumerate(results):
        want = dense_natural_gradient(gradients[: t + 1], 4, 0.5).reshape(got.shape)
        # Exact up to the rounding of the result itself to bfloat16.
        rounded = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64)
        np.testing.assert_allclose(got, rounded, rtol=2**-8, atol=1e-7)


def test_history_dtype_rounds_the_gradient_and_nothing_else():
    gradients = normals(6)
    rounded = [np.asarray(jnp.asarray(g, jnp.bfloat16), np.float32) for g in gradients]
    results = run(gradients, history=4, damping=0.5, history_dtype=jnp.bfloat16)
    for t, got in enumerate(results):
        want = dense_natural_gradient(rounded[: t + 1], 4, 0.5)
        assert np.linalg.norm(got.ravel() - want) <= 1e-5 * np.linalg.norm(want)


def test_leading_axes_are_independent_blocks():
    stacks = normals(6, shape=(3, 5, 4))
    together = run(stacks, history=3, damping=0.2)
    for layer in range(3):
        alone = run([g[layer] for g in stacks], history=3, damping=0.2)
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[layer], b, rtol=2e-5, atol=1e-7)


def test_damping_schedule_is_evaluated_at_the_step():
    gradients = normals(3)
    results = run(gradients, history=2, damping=lambda step: 0.1 * 10.0**step)
    for t, got in enumerate(results):
        want = dense_natural_gradient(gradients[: t + 1], 2, 0.1 * 10.0**t)
        assert np.linalg.norm(got.ravel() - want) <= 1e-5 * np.linalg.norm(want)


def test_only_projected_matrices_have_a_history_inside_a_subspace():
    params = {"w": jnp.ones((6, 8)), "embed": jnp.ones((20, 6)), "b": jnp.ones(8)}
    state = ng.chain(ng.natural_galore(rank=2, history=3)).init(params)
    history = state[1].history
    assert history.columns["w"].shape == (3, 2, 8)
    assert isinstance(history.columns["embed"], optax.MaskedNode)
    assert isinstance(history.columns["b"], optax.MaskedNode)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("bad", [(1,), (4,), (0, 5), (4, 5)])
def test_a_gradient_that_is_not_finite_leaves_no_trace(bad, mode):
    length, gradients = 3, normals(9)
    given = [np.full_like(g, np.nan) if t in bad else g for t, g in enumerate(gradients)]
    results = run(given, history=length, damping=0.3, damping_mode=mode)
    seen = []
    for t, (g, got) in enumerate(zip(gradients, results, strict=True)):
        if t in bad:
            assert not np.isfinite(got).any()
            continue
        seen.append(g)
        want = dense_natural_gradient(seen, length, 0.3, mode == "relative")
        np.testing.assert_allclose(got.ravel(), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_each_matrix_of_a_stack_has_its_own_history():
    stacks = normals(8, (2, 6, 9))
    stacks[2][0] = np.inf
    together = run(stacks, history=3, damping=0.2)
    for layer in range(2):
        finite = [t for t in range(8) if (t, layer) != (2, 0)]
        alone = run([stacks[t][layer] for t in finite], history=3, damping=0.2)
        for t, got in zip(finite, alone, strict=True):
            np.testing.assert_allclose(together[t][layer], got, rtol=1e-5, atol=1e-7)


def test_tiny_gradients_in_float16_have_finite_natural_gradients():
    (natural,) = run([np.full((4, 4), 6e-7, np.float16)], history=2, damping_mode="relative")
    np.testing.assert_array_equal(natural, float(jnp.finfo(jnp.float16).max))


def test_a_damping_beyond_float32_gives_zero():
    (natural,) = run(normals(1), history=2, damping=lambda step: jnp.float32(jnp.inf))
    assert np.abs(natural).max() < 1e-37
