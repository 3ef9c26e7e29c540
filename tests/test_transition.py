"""Moments and history after a change of the subspace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import updates_of

import natgalore_jax as ng
from natgalore_jax._src.kernels.rotation import rotate_linear, rotate_second_moment


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0].astype(np.float32)


def test_linear_rotation_is_the_mode_product():
    M, C, D = np.random.default_rng(0).standard_normal((3, 4, 4)).astype(np.float32)
    got = rotate_linear(jnp.asarray(M), {0: C, 1: D})
    np.testing.assert_allclose(got, C @ M @ D.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rotate", [rotate_linear, rotate_second_moment])
def test_products_are_exact_on_every_device(rotate):
    """Accelerators would round the moments to TF32 or bfloat16 at every refresh."""
    program = str(jax.make_jaxpr(lambda M, C: rotate(M, {0: C}))(np.eye(3), np.eye(3)))
    assert program.count("dot_general") == 1 and "DEFAULT" not in program and "HIGHEST" in program


def test_second_moments_are_variances_of_rotated_coordinates():
    """Monte Carlo: independent coordinates with variances V, rotated, have the variances given."""
    rng = np.random.default_rng(0)
    V, C = rng.uniform(0.1, 2.0, (4, 3)), orthogonal(4)
    samples = rng.standard_normal((200_000, 4, 3)) * np.sqrt(V)
    empirical = np.var(np.einsum("ij,tjn->tin", C, samples), axis=0)
    got = rotate_second_moment(jnp.asarray(V, jnp.float32), {0: C})
    np.testing.assert_allclose(got, empirical, rtol=0.02)


def test_second_moments_stay_positive_and_keep_their_sum_in_the_same_space():
    V = np.random.default_rng(1).uniform(0, 1, (5, 7)).astype(np.float32)
    got = np.asarray(rotate_second_moment(jnp.asarray(V), {0: orthogonal(5)}))
    assert np.all(got >= 0)
    np.testing.assert_allclose(got.sum(0), V.sum(0), rtol=1e-5)


def test_directions_never_seen_take_the_mean_second_moment():
    V = np.random.default_rng(1).uniform(0, 1, (5, 7)).astype(np.float32)
    got = rotate_second_moment(jnp.asarray(V), {0: np.zeros((5, 5), np.float32)})
    np.testing.assert_allclose(got, np.broadcast_to(V.mean(0), V.shape), rtol=1e-5)


def rotated_state(state, C, moment_fields):
    """The state of a chain in another basis of the same row space: P ← P Cᵀ, by hand."""
    project, *inner = state
    rows, cols = project.basis
    rows = {"w": rows["w"] @ C.T}

    def rotate(path, x):
        field = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
        if field and field[-1] in moment_fields and getattr(x, "ndim", 0) >= 2:
            return jnp.einsum("ij,...jn->...in", C, x)
        return x

    return (project._replace(basis=(rows, cols)), *jax.tree.map_with_path(rotate, tuple(inner)))


@pytest.mark.parametrize(
    "inner,fields",
    [
        (lambda: optax.sgd(0.1, momentum=0.9), {"trace"}),
        (lambda: ng.woodbury_natural_gradient(history=3, damping=0.1), {"columns"}),
    ],
)
def test_update_in_full_space_does_not_depend_on_the_coordinates(inner, fields):
    """Two runs, one of them moved to other coordinates of the same space: the same updates."""
    C = orthogonal(4)
    rng = np.random.default_rng(0)
    tx = ng.chain(
        ng.low_rank_project(rank=4, update_interval=1000, side="left"), inner(), ng.project_back()
    )
    grads = [{"w": jnp.asarray(rng.standard_normal((8, 12)), jnp.float32)} for _ in range(6)]
    state = tx.init(grads[0])
    for g in grads[:3]:
        _, state = tx.update(g, state, g)
    other = rotated_state(state, C, fields)
    for g in grads[3:]:
        u, state = tx.update(g, state, g)
        v, other = tx.update(g, other, g)
        np.testing.assert_allclose(u["w"], v["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: optax.trace(0.9),
        lambda: ng.woodbury_natural_gradient(history=3, damping=0.1),
    ],
)
def test_rotation_into_the_same_space_changes_nothing(side, inner):
    """Gradients of rank r keep one subspace, whose SVD basis still turns at each refresh."""
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((10, 3)), rng.standard_normal((3, 14))
    grads = [{"w": jnp.asarray(A @ rng.standard_normal((3, 3)) @ B, jnp.float32)} for _ in range(9)]

    def updates(interval):
        tx = ng.chain(
            ng.low_rank_project(
                rank=3, update_interval=interval, side=side, method="svd", stagger=False
            ),
            inner(),
            ng.project_back(),
        )
        return [np.asarray(u["w"]) for u in updates_of(tx, grads)[0]]

    for once, often in zip(updates(1000), updates(2), strict=True):
        np.testing.assert_allclose(often, once, rtol=1e-3, atol=1e-4 * np.abs(once).max())


@pytest.mark.parametrize("transition", ["rotate", "reset", "keep"])
def test_each_transition_does_to_adam_what_it_says(transition):
    rng = np.random.default_rng(0)
    grads = [{"w": jnp.asarray(rng.standard_normal((6, 9)), jnp.float32)} for _ in range(3)]
    tx = ng.chain(
        ng.low_rank_project(
            rank=4, update_interval=2, side="left", method="svd", transition=transition
        ),
        ng.woodbury_natural_gradient(2, 10.0, "absolute"),
        optax.scale_by_adam(),
    )
    state = tx.init(grads[0])
    for g in grads[:2]:
        _, state = tx.update(g, state)
    before = state
    _, after = tx.update(grads[2], before)
    P, P_new = (np.asarray(s[0].basis[0]["w"]) for s in (before, after))
    C = P_new.T @ P
    assert np.abs(C - np.eye(4)).max() > 0.1
    R = P_new.T @ np.asarray(grads[2]["w"])

    mu, nu = (np.asarray(getattr(before[2], f)["w"]) for f in ("mu", "nu"))
    old_column = np.asarray(before[1].history.columns["w"][1])
    if transition == "rotate":
        W = C**2
        W = W + (1 - W.sum(1, keepdims=True)) / 4
        mu, nu, old_column = C @ mu, W @ nu, C @ old_column
    elif transition == "reset":
        mu, nu, old_column = 0 * mu, 0 * nu, 0 * old_column
    columns = after[1].history.columns["w"]
    np.testing.assert_allclose(columns[0], R, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(columns[1], old_column, rtol=1e-4, atol=1e-5)
    H = np.stack([R.ravel(), old_column.ravel()], 1)
    np.testing.assert_allclose(after[1].history.gram["w"], H.T @ H, rtol=1e-3, atol=1e-4)

    h = np.linalg.solve(10.0 * np.eye(36) + H @ H.T, R.ravel()).reshape(R.shape)
    np.testing.assert_allclose(after[2].mu["w"], 0.9 * mu + 0.1 * h, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after[2].nu["w"], 0.999 * nu + 0.001 * h * h, rtol=1e-4, atol=1e-9)


def test_factored_second_moments_of_adafactor_rotate():
    rng = np.random.default_rng(0)
    grads = [{"w": jnp.asarray(rng.standard_normal((8, 12)), jnp.float32)} for _ in range(3)]
    tx = ng.chain(
        ng.low_rank_project(rank=5, update_interval=2, side="left", method="svd"),
        optax.scale_by_factored_rms(min_dim_size_to_factor=4),
    )
    state = tx.init(grads[0])
    for g in grads[:2]:
        _, state = tx.update(g, state, g)
    _, after = tx.update(grads[2], state, grads[2])
    P, P_new = (np.asarray(s[0].basis[0]["w"]) for s in (state, after))
    W = (P_new.T @ P) ** 2
    W = W + (1 - W.sum(1, keepdims=True)) / 5
    R2 = (P_new.T @ np.asarray(grads[2]["w"])) ** 2 + 1e-30
    decay = 1 - 3.0**-0.8
    row, col = np.asarray(state[1].v_row["w"]), np.asarray(state[1].v_col["w"])
    assert row.shape == (5,) and col.shape == (12,)
    np.testing.assert_allclose(
        after[1].v_row["w"], decay * (W @ row) + (1 - decay) * R2.mean(1), rtol=1e-3
    )
    np.testing.assert_allclose(
        after[1].v_col["w"], decay * col + (1 - decay) * R2.mean(0), rtol=1e-3
    )
