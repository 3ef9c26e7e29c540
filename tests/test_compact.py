"""compact_natural_gradient against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles.galore import Adam, svd_bases
from replay import updates_of

import natgalore_jax as ng
from natgalore_jax._src.kernels.fisher_factors import inverse_power

pytestmark = pytest.mark.usefixtures("fast_compile")

STEPS, RANK, SCALE, EPS = 5, 3, 0.5, 0.1


def gradients(shape=(6, 9), steps=STEPS):
    return np.random.default_rng(0).normal(size=(steps, *shape)).astype(np.float32)


def matrix_power(A, exponent):
    w, U = np.linalg.eigh(A)
    return U * w**exponent @ U.T


def oracle(grads, side, damping, relative, exponent, decay, structure, cautious=False):
    """U = αP Ñ with one basis for all steps."""
    adam, factors, updates = Adam(eps=EPS), {}, []
    P, Q = svd_bases(grads[0].astype(np.float64), RANK, side)
    sides = {"left": [0], "right": [1], "both": [0, 1]}[side]
    for G in grads.astype(np.float64):
        R = P.T @ G @ Q
        N = adam(R)
        new = N
        for s in sides:
            gram = R @ R.T if s == 0 else R.T @ R
            if structure == "diagonal":
                gram = np.diag(np.diag(gram))
            A = factors[s] = decay * factors[s] + (1 - decay) * gram if s in factors else gram
            shift = damping * np.trace(A) / len(A) if relative else damping
            W = matrix_power(A + shift * np.eye(len(A)), exponent / len(sides))
            new = W @ new if s == 0 else new @ W
        new = new * np.linalg.norm(N) / np.linalg.norm(new)
        if cautious:
            agrees = np.sign(new) == np.sign(R)
            new = np.where(agrees, new, 0.0) / max(np.mean(agrees), 0.05)
        updates.append(SCALE * P @ new @ Q.T)
    return np.stack(updates)


def optimizer(side="left", transition="rotate", interval=100, **arguments):
    return ng.chain(
        ng.low_rank_project(
            rank=RANK,
            side=side,
            method="svd",
            update_interval=interval,
            transition=transition,
            stagger=False,
        ),
        ng.compact_natural_gradient(optax.scale_by_adam(eps=EPS), **arguments),
        ng.project_back(scale=SCALE),
    )


def run(tx, grads):
    return np.stack([u["w"] for u in updates_of(tx, [{"w": g} for g in grads])[0]])


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.25])
@pytest.mark.parametrize("mode, damping", [("relative", 0.1), ("absolute", 2.0)])
@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_against_numpy(side, exponent, mode, damping, structure):
    grads, more = gradients(), {"exponent": exponent, "decay": 0.8, "structure": structure}
    expected = oracle(grads, side, damping, mode == "relative", **more)
    tx = optimizer(side, damping=damping, damping_mode=mode, **more)
    np.testing.assert_allclose(run(tx, grads), expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(expected, oracle(grads, side, 1e6, False, **more), rtol=0.05)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_cautious_against_numpy(side):
    grads = gradients(steps=12)
    more = {"exponent": -0.5, "decay": 0.8, "structure": "diagonal"}
    expected = oracle(grads, side, 0.1, True, **more, cautious=True)
    tx = optimizer(side, damping=0.1, cautious=True, **more)
    np.testing.assert_allclose(run(tx, grads), expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(expected, oracle(grads, side, 0.1, True, **more), rtol=0.05)


def test_cautious_steps_stay_small_where_nearly_all_entries_disagree():
    tx, g = optimizer(cautious=True), gradients()[0]
    state = tx.init({"w": g})
    for _ in range(20):
        before, state = tx.update({"w": g}, state)
    R = np.asarray(state[0].basis[0]["w"]).T @ g
    largest = np.unravel_index(np.argmax(np.abs(R)), R.shape)
    opposed = -1e-3 * R
    opposed[largest] *= -1
    now, _ = tx.update({"w": np.asarray(state[0].basis[0]["w"]) @ opposed}, state)
    norms = [np.linalg.norm(u["w"]) for u in (now, before)]
    assert 0 < norms[0] < norms[1] / 0.05 / np.sqrt(R.size)


def test_the_scale_of_the_loss_does_not_matter_to_relative_damping():
    grads = gradients()
    tx = ng.chain(ng.low_rank_project(rank=RANK, method="svd"), ng.compact_natural_gradient())
    np.testing.assert_allclose(
        run(tx, 1e-12 * grads), 1e-12 * run(tx, grads), rtol=1e-3, atol=1e-15
    )


@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_layers_in_a_stack_are_independent(structure):
    grads = gradients((2, 6, 9))
    tx = optimizer(interval=2, structure=structure)
    stacked = run(tx, grads)
    for layer in range(2):
        np.testing.assert_allclose(
            stacked[:, layer], run(tx, grads[:, layer]), rtol=1e-4, atol=1e-5
        )


def factor_after_a_refresh(transition, structure="full"):
    """Fisher factors and bases before and after a step that changes the basis."""
    tx = optimizer(interval=2, transition=transition, decay=0.999999, structure=structure)
    grads = gradients(steps=3)
    state = tx.init({"w": grads[0]})
    for g in grads[:2]:
        _, state = tx.update({"w": g}, state)
    before = state
    _, after = tx.update({"w": grads[2]}, before)
    return [
        (np.asarray(s[0].basis[0]["w"]), np.asarray(s[1].fisher[0]["w"])) for s in (before, after)
    ]


def test_factors_move_with_the_basis():
    (P, A), (P_new, A_new) = factor_after_a_refresh("rotate")
    C = P_new.T @ P
    assert np.linalg.norm(C @ C.T - np.eye(RANK)) > 0.1
    expected = C @ A @ C.T + (np.eye(RANK) - C @ C.T) * np.trace(A) / RANK
    np.testing.assert_allclose(A_new, expected, rtol=1e-3, atol=1e-3)
    assert np.min(np.linalg.eigvalsh(A_new)) > 0


def test_diagonal_factors_move_with_the_basis():
    (P, d), (P_new, d_new) = factor_after_a_refresh("rotate", "diagonal")
    C = P_new.T @ P
    expected = np.diag(C @ np.diag(d) @ C.T + (np.eye(RANK) - C @ C.T) * np.mean(d))
    np.testing.assert_allclose(d_new, expected, rtol=1e-3)


def test_keep_and_reset():
    (_, A), (_, A_new) = factor_after_a_refresh("keep")
    np.testing.assert_allclose(A_new, A, rtol=1e-3, atol=1e-3)
    (_, A), (P_new, A_new) = factor_after_a_refresh("reset")
    R = P_new.T @ gradients(steps=3)[2]
    np.testing.assert_allclose(A_new, R @ R.T, rtol=1e-4, atol=1e-4)


def test_tucker_has_a_factor_for_each_axis():
    tx = ng.chain(ng.low_rank_project(rank=(2, 3, 2)), ng.compact_natural_gradient(modes=3))
    params = {"w": jnp.asarray(gradients((4, 5, 6))[0])}
    updates, state = tx.update(params, tx.init(params))
    assert [f["w"].shape for f in state[1].fisher] == [(2,), (3,), (2,)]
    assert np.all(np.isfinite(updates["w"]))
    with pytest.raises(ValueError, match="modes=3"):
        ng.chain(ng.low_rank_project(rank=(2, 3, 2)), ng.compact_natural_gradient()).init(params)


def test_zeros_and_what_is_not_finite_pass_and_leave_no_trace():
    tx, grads = optimizer(), gradients()
    state = tx.init({"w": jnp.zeros((6, 9))})
    updates, state = tx.update({"w": jnp.zeros((6, 9))}, state)
    np.testing.assert_array_equal(updates["w"], 0)
    _, state = tx.update({"w": grads[0]}, state)
    _, after = tx.update({"w": jnp.asarray(grads[1]).at[0, 0].set(jnp.nan)}, state)
    np.testing.assert_array_equal(after[1].fisher[0]["w"], state[1].fisher[0]["w"])


@pytest.mark.parametrize("structure, numbers", [("diagonal", RANK), ("full", RANK**2)])
def test_it_costs_r_or_r_squared(structure, numbers):
    params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
    report = ng.memory_report(optimizer(structure=structure), params)
    galore = ng.memory_report(ng.galore_adamw(0.1, rank=RANK, side="left"), params)
    assert report.part_bytes["history"] == 4 * numbers
    for part in ("basis", "inner"):
        assert report.part_bytes[part] == galore.part_bytes[part]


def test_outside_of_a_subspace_is_an_error():
    with pytest.raises(ValueError, match="after low_rank_project"):
        ng.compact_natural_gradient().init({"w": jnp.ones((6, 9))})


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"decay": 1.0}, "decay must be at least 0 and less than 1, got 1.0"),
        ({"damping": 0.0}, "damping must be greater than 0, got 0.0"),
        ({"damping_mode": "other"}, "damping_mode must be one of"),
        ({"structure": "other"}, "structure must be one of diagonal, full"),
        ({"cautious": 1}, "cautious must be True or False, got 1"),
        ({"exponent": 0.5}, "exponent must be at least -1 and less than 0, got 0.5"),
    ],
)
def test_arguments(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        ng.compact_natural_gradient(**arguments)


def test_full_factor_without_damping_does_not_amplify_rounding_errors():
    # A is of rank one: (A + λI)⁻¹ N is N outside of that direction, however small λ is.
    rng = np.random.default_rng(0)
    v, z = rng.standard_normal((8, 1)), rng.standard_normal((1, 40))
    A = jnp.asarray((v @ z) @ (v @ z).T, jnp.float32)
    W = np.asarray(inverse_power(A, 1e-12, -1.0, 0, relative=True), np.float64)
    u = v / np.linalg.norm(v)
    outside = np.eye(8) - u @ u.T
    np.testing.assert_allclose(W / np.linalg.norm(W, 2), outside, atol=1e-4)
