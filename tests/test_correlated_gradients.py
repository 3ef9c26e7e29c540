"""Natural gradients of nearly parallel gradients, for which λI + HᵀH is close to singular.

float32 holds the Gram matrix to eps, so that the solve is known to eps/μ with μ the smallest
eigenvalue of the matrix scaled to a unit diagonal. The oracle is a QR factorisation of the stacked
``[H; √λ I]`` in float64, which never squares the condition number.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from replay import updates_of

import natgalore_jax as ng

EPS = float(np.finfo(np.float32).eps)
NORMS = (1e-6, 1e-3, 1.0, 100.0, 1e4)
CHANGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
SHAPE = (16, 64)


def oracle(H, lam):
    """``H (λI + HᵀH)⁻¹ e_t``, and the smallest eigenvalue μ of the scaled matrix."""
    s = H.shape[1]
    R = np.linalg.qr(np.vstack([H, np.sqrt(lam) * np.eye(s)]), mode="r")
    half = scipy.linalg.solve_triangular(R, np.eye(s)[-1], trans="T")
    scaled = R / np.linalg.norm(R, axis=0)
    mu = np.linalg.svd(scaled, compute_uv=False)[-1] ** 2
    return H @ scipy.linalg.solve_triangular(R, half), mu


def sequences(steps, walk):
    """Gradients of every norm that change by every fraction: steps of (cases,) + SHAPE, float64."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(SHAPE)
    current = dict.fromkeys(CHANGES, base)
    for _ in range(steps):
        for c in CHANGES:
            current[c] = (current[c] if walk else base) + c * rng.standard_normal(SHAPE)
        yield np.stack([n * g / np.linalg.norm(g) for n in NORMS for g in current.values()])


@pytest.mark.parametrize("length", [1, 2, 10, 50])
@pytest.mark.parametrize(
    "dtype, history_dtype, mode, damping, walk",
    [
        ("float32", None, "absolute", 1e-3, False),
        ("float32", None, "absolute", 1e-9, True),
        ("float32", None, "relative", 1e-8, False),
        ("float32", "bfloat16", "absolute", 1e-3, True),
        ("bfloat16", None, "absolute", 1e-3, False),
    ],
)
def test_error_is_bounded_by_the_smallest_eigenvalue(
    length, dtype, history_dtype, mode, damping, walk
):
    seen = [jnp.asarray(g, dtype) for g in sequences(length + 4, walk)]
    tx = ng.woodbury_natural_gradient(length, damping, mode, history_dtype)
    update, state = jax.jit(tx.update), tx.init(seen[0])
    for t, h in enumerate(seen):
        got, state = update(h, state)
        got = np.asarray(got, np.float64).reshape(len(h), -1)
        assert np.isfinite(got).all(), t
        if 3 < t < length:  # the rest of a long way to a full ring, which takes the oracle long
            continue
        stored = [np.asarray(g.astype(history_dtype or dtype), np.float64) for g in seen[: t + 1]]
        for case, vector in enumerate(got):
            H = np.stack([g[case].ravel() for g in stored[-length:]], axis=1)
            lam = damping * (np.sum(H * H) / H.shape[1] if mode == "relative" else 1.0)
            want, mu = oracle(H, lam)
            error = np.linalg.norm(vector - want) / np.linalg.norm(want)
            # The update has the dtype of the gradient: half a unit in the last of 8 bits.
            rounded = 2.0**-8 if dtype == "bfloat16" else 0.0
            assert error <= min(4 * length * EPS / mu, 1.01) + rounded, (t, case, error, mu)
            assert np.linalg.norm(vector) <= (1.01 + rounded) * np.linalg.norm(want), (t, case)


@pytest.mark.parametrize("columns_dtype", [jnp.float32, jnp.bfloat16])
def test_gram_matrix_of_large_gradients_is_accurate(columns_dtype):
    # 2²⁰ elements: a matrix-vector product on CPUs has a relative error of 190 eps here.
    rng = np.random.default_rng(0)
    base = rng.standard_normal((256, 4096), np.float32)
    gradients = [
        jnp.asarray(base + 1e-2 * rng.standard_normal(base.shape, np.float32), columns_dtype)
        for _ in range(4)
    ]
    _, state = updates_of(ng.woodbury_natural_gradient(history=4), gradients)
    H = np.stack([np.asarray(g, np.float64).ravel() for g in gradients], axis=1)
    exact = H.T @ H
    np.testing.assert_allclose(state.history.gram, exact, rtol=4 * EPS)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_full_batch_regression_with_a_summed_loss_stays_finite(scale):
    # A summed loss has large gradients, and a full batch nearly parallel ones.
    rng = np.random.default_rng(0)
    X = jnp.asarray(rng.standard_normal((512, 24)), jnp.float32)
    Y = X @ jnp.asarray(rng.standard_normal((24, 16)), jnp.float32)

    def loss(params):
        return scale * jnp.sum((X @ params["w"] - Y) ** 2)

    tx = ng.paper_natural_galore_adamw(5e-2, rank=4, update_interval=50)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), value

    params = {"w": jnp.zeros((24, 16))}
    _, losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=400))(params)
    assert np.isfinite(losses).all()
    # Slowly: the natural gradient is as short as 1 over the gradient, and eps is above its square.
    assert losses[-1] < losses[0]
