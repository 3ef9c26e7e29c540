"""Clipping of the leading singular values, against dense SVDs in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng
from natgalore_jax._src.kernels.factored_update import FactoredUpdate, whole
from natgalore_jax._src.kernels.spectral import clip_leading_of_factored
from natgalore_jax._src.params.plan import PlanSettings, plan_tree

RNG = np.random.default_rng(0)


def _with_spectrum(values, m, n, rng=RNG):
    left, right = (np.linalg.qr(rng.standard_normal((side, len(values))))[0] for side in (m, n))
    return (left * values) @ right.T


def _clip(U, **settings):
    tx = ng.clip_leading_singular_value(**{"where": True, **settings})
    updates, state = tx.update(U, tx.init(U))
    assert state == optax.EmptyState()
    return updates


def _expected(U, limit, count=1):
    left, values, right = np.linalg.svd(np.asarray(U, np.float64), full_matrices=False)
    values[:count] = np.minimum(values[:count], limit * np.sqrt(max(U.shape)))
    return (left * values) @ right


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15, 1e-28, 1e28])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24), (1, 9), (32, 32)])
def test_one_large_singular_value(m, n, size):
    values = np.array([1000.0, 1.0, 0.9, 0.5])[: min(m, n)]
    U = (size * _with_spectrum(values, m, n, np.random.default_rng(0))).astype(np.float32)
    for limit in (0.3 * size, 2.0 * size, 1000 * size):  # The last one changes nothing.
        clipped = np.asarray(_clip({"w": U}, limit=limit)["w"]) / size
        # x is off by about (1 / 1000)², which σ₁ = 1000 multiplies.
        np.testing.assert_allclose(clipped, _expected(U / size, limit / size), atol=5e-3)
    np.testing.assert_array_equal(_clip({"w": U}, limit=1000 * size)["w"], U)


@pytest.mark.parametrize("size", [1e-28, 1.0, 1e28])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 30])
@pytest.mark.parametrize(("m", "n"), [(24, 40), (40, 24), (2, 9), (32, 32)])
def test_several_large_singular_values(m, n, count, size):
    """Exact where there are no others, also if fewer than are clipped."""
    values = np.array([1000.0, 100.0, 10.0])[: min(m, n)]
    U = (size * _with_spectrum(values, m, n, np.random.default_rng(0))).astype(np.float32)
    clipped = np.asarray(_clip({"w": U}, limit=0.3 * size, singular_values=count)["w"]) / size
    np.testing.assert_allclose(clipped, _expected(U / size, 0.3, count), atol=2e-3)


def test_the_leading_singular_value_is_found_where_others_are_near():
    """One power iteration would leave 1.32 of the bound in the median."""
    values, left = np.r_[1.0, 0.7 / np.sqrt(np.arange(1, 128))], []
    for seed in range(20):
        U = _with_spectrum(values, 128, 344, np.random.default_rng(seed)).astype(np.float32)
        clipped = np.asarray(_clip({"w": U}, limit=0.7 / np.sqrt(344))["w"])
        left.append(np.linalg.norm(clipped, 2) / 0.7)
    assert np.median(left) < 1.04 and max(left) < 1.25


@pytest.mark.parametrize("count", [1, 2, 4])
def test_no_singular_value_grows_and_rank_one_has_the_bound(count):
    spectra = (np.ones(24), np.arange(1.0, 25), np.arange(1.0, 25) ** 3, np.eye(24)[0])
    matrices = [_with_spectrum(values, 24, 40) for values in spectra]
    for U in (*matrices, np.ones((24, 40)), np.eye(24, 40), np.ones((2, 40))):
        U = U.astype(np.float32)
        before = np.linalg.svd(U, compute_uv=False)
        updates = _clip({"w": U}, limit=0.01, singular_values=count)
        after = np.linalg.svd(updates["w"], compute_uv=False)
        assert np.all(after <= before + 1e-5 * before[0])
        assert np.sum(after**2) < np.sum(before**2)
        if before[1] < 1e-5 * before[0]:
            # 1 − bound / σ₁ is rounded, and σ₁ multiplies that.
            np.testing.assert_allclose(after[0], 0.01 * np.sqrt(40), atol=3e-7 * before[0])


def test_what_is_clipped():
    params = {
        "embed": {"embedding": np.ones((64, 16))},
        "mlp": {"kernel": np.ones((16, 48)), "bias": np.ones(48)},
        "lm_head": {"kernel": np.ones((16, 64))},
    }
    updates = _clip(jax.tree.map(jnp.asarray, params), where=ng.hidden_matrices)
    changed = jax.tree.map(lambda new, old: bool(np.any(new != old)), updates, params)
    assert changed["mlp"] == {"kernel": True, "bias": False}
    assert not changed["embed"]["embedding"] and not changed["lm_head"]["kernel"]


def test_stacked_matrices_and_matrices_with_more_axes_are_clipped_each_by_itself():
    layers = jnp.asarray(RNG.standard_normal((3, 6, 8, 5)), jnp.float32) + 2.0
    axes = ng.MatrixAxes(rows=1, cols=(2, 3))
    stacked = _clip({"w": layers}, axes=axes)["w"]
    for layer, clipped in zip(layers, stacked, strict=True):
        expected = _clip({"w": layer.reshape(6, 40)})["w"].reshape(6, 8, 5)
        np.testing.assert_allclose(clipped, expected, rtol=1e-5, atol=1e-6)
        assert np.max(np.abs(clipped - layer)) > 0.5
    with_nan = _clip({"w": layers.at[1, 0, 0, 0].set(jnp.nan)}, axes=axes)["w"]
    np.testing.assert_array_equal(with_nan[0], stacked[0])
    assert np.isnan(with_nan[1, 0, 0, 0])


def test_zeros_dtypes_and_traced_limits():
    for size in (0.0, 1e-30):
        U = jnp.full((8, 9), size)
        np.testing.assert_array_equal(_clip({"w": U})["w"], U)
    assert _clip({"w": jnp.ones((8, 9), jnp.bfloat16)})["w"].dtype == jnp.bfloat16
    U = jnp.ones((8, 9))
    traced = jax.jit(lambda limit: _clip({"w": U}, limit=limit)["w"])(0.1)
    np.testing.assert_allclose(traced, _clip({"w": U}, limit=0.1)["w"], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(traced, 2), 0.3, rtol=1e-5)


def test_float64_updates_keep_their_precision():
    small, large = RNG.standard_normal((8, 9)) * 1e-3, np.outer(np.arange(1.0, 9), np.ones(9))
    with jax.enable_x64(True):
        updates = {"small": jnp.asarray(small), "large": jnp.asarray(large)}
        clipped = _clip(updates, limit=0.1)
    np.testing.assert_array_equal(clipped["small"], small)
    np.testing.assert_allclose(clipped["large"], _expected(large, 0.1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [0, -1.0, "0.2", None])
def test_limit_must_be_a_positive_number(limit):
    with pytest.raises((TypeError, ValueError), match="limit must be"):
        ng.clip_leading_singular_value(limit)


@pytest.mark.parametrize("count", [0, 1.5, None])
def test_the_number_of_singular_values_is_a_positive_integer(count):
    with pytest.raises((TypeError, ValueError), match="singular_values must be"):
        ng.clip_leading_singular_value(singular_values=count)
    with pytest.raises((TypeError, ValueError), match="singular_values must be"):
        ng.project_back(singular_limit=0.2, singular_values=count)
    with pytest.raises(ValueError, match="singular_values has no effect without singular_limit"):
        ng.project_back(singular_values=4)


SIDES = [("left", 24, 40), ("right", 24, 40), ("left", 40, 24), ("right", 40, 24)]


def _subspace(limit=None, residual="none", count=1, **project):
    of_limit = {} if limit is None else {"singular_limit": limit, "singular_values": count}
    tail = ng.project_back(residual=residual, **of_limit)
    return ng.chain(ng.low_rank_project(where=True, **{"rank": 4, **project}), tail)


@pytest.mark.parametrize("residual", ["none", "fira", "fisher"])
@pytest.mark.parametrize(("side", "m", "n"), SIDES)
def test_of_a_subspace_the_whole_update_is_clipped(side, m, n, residual):
    G = {"w": jnp.asarray(_with_spectrum([1000.0, 1.0, 0.9, 0.5, 0.4, 0.3], m, n), jnp.float32)}
    free, clipping = (_subspace(c, residual, side=side) for c in (None, 0.05))
    U, _ = free.update(G, free.init(G))
    clipped, _ = clipping.update(G, clipping.init(G))
    size = np.linalg.norm(U["w"], 2)
    # One iteration from random numbers where A is no help leaves an error of the order of σ₂.
    np.testing.assert_allclose(clipped["w"], _expected(U["w"], 0.05), atol=3e-4 * size)
    assert np.linalg.norm(clipped["w"], 2) < 0.5 * size


@pytest.mark.parametrize("residual", ["none", "fira"])
@pytest.mark.parametrize(("side", "m", "n"), SIDES)
def test_of_a_subspace_several_singular_values_are_clipped(side, m, n, residual):
    values = [1000.0, 200.0, 50.0, 1.0, 0.9, 0.5]
    G = {"w": jnp.asarray(_with_spectrum(values, m, n), jnp.float32)}
    free, clipping = (_subspace(c, residual, 3, side=side) for c in (None, 0.05))
    U, _ = free.update(G, free.init(G))
    clipped, _ = clipping.update(G, clipping.init(G))
    before, after = (np.linalg.svd(x["w"], compute_uv=False) for x in (U, clipped))
    assert np.all(before[:3] > 20)
    assert np.all(after[:3] < 4)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("inside", [0.0, 1.0])
@pytest.mark.parametrize("outside", [0.0, 1.0])
@pytest.mark.parametrize(("side", "m", "n"), SIDES)
def test_a_leading_direction_inside_or_outside_the_basis_is_found(
    side, m, n, inside, outside, count
):
    rows = side == "left"
    settings = PlanSettings(4, True, None, side)
    (plan,) = plan_tree(settings, {"w": jnp.ones((m, n))})
    P = np.linalg.qr(RNG.standard_normal((m if rows else n, 4)))[0]
    N = inside * _with_spectrum([1000.0, 0.1, 0.1], *((4, n) if rows else (m, 4)))
    G = _with_spectrum([500.0, 0.1, 0.1], m, n)
    phi = outside * RNG.uniform(0.5, 1.5, n if rows else m)
    if rows:
        R, U = P.T @ G, P @ N + (G - P @ (P.T @ G)) * phi
        low = N - R * phi
    else:
        R, U = G @ P, N @ P.T + phi[:, None] * (G - (G @ P) @ P.T)
        low = N - phi[:, None] * R
    update = FactoredUpdate(*(jnp.asarray(x, jnp.float32) for x in (low, phi)))
    P, G = jnp.asarray(P, jnp.float32), jnp.asarray(G, jnp.float32)
    N = jnp.asarray(N, jnp.float32)
    update = clip_leading_of_factored(plan, (P,), update, N, G, 0.5, count)
    clipped = whole(plan, (P,), update, G)
    before, after = (np.linalg.svd(x, compute_uv=False) for x in (U, np.asarray(clipped)))
    assert np.all(after <= before + 1e-5 * before[0])
    if inside != outside:  # One large singular value: the bound holds.
        np.testing.assert_allclose(
            clipped, _expected(U, 0.5, count), atol=2e-3 * max(before[0], 1e-3)
        )


def test_of_a_subspace_layers_and_attention_heads_are_clipped_each_by_itself():
    layers = jnp.asarray(RNG.standard_normal((3, 6, 8, 5)), jnp.float32) + 2.0
    axes = ng.MatrixAxes(rows=1, cols=(2, 3))
    stacked_tx, tx = (
        _subspace(0.1, "fisher", rank=3, axes=axes, stagger=False),
        _subspace(0.1, "fisher", rank=3),
    )
    stacked, _ = stacked_tx.update({"w": layers}, stacked_tx.init({"w": layers}))
    for layer, clipped in zip(layers, stacked["w"], strict=True):
        single = {"w": layer.reshape(6, 40)}
        expected, _ = tx.update(single, tx.init(single))
        np.testing.assert_allclose(clipped.reshape(6, 40), expected["w"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("residual", ["none", "fisher"])
@pytest.mark.parametrize("project", [{"side": "both"}, {"rank": (3, 3, 3)}])
def test_of_a_subspace_as_by_the_transformation_after_it(project, residual):
    grads = {"w": jnp.asarray(RNG.standard_normal((6, 8, 9)) + 1.0, jnp.float32)}
    free, clipping = (_subspace(c, residual, **project) for c in (None, 0.1))
    whole, _ = free.update(grads, free.init(grads))
    clipped, _ = clipping.update(grads, clipping.init(grads))
    expected = _clip(whole, limit=0.1)["w"]
    np.testing.assert_allclose(clipped["w"], expected, rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(expected - whole["w"])) > 0.1


@pytest.mark.parametrize("side", ["left", "both"])
def test_axes_of_rows_in_any_order(side):
    axes, tensor = ng.MatrixAxes(rows=(2, 0), cols=1), RNG.standard_normal((4, 15, 3)) + 1.0
    clipped = {}
    for name, value, of in (
        ("tensor", tensor, axes),
        ("matrix", tensor.transpose(2, 0, 1).reshape(12, 15), None),
    ):
        grads = {"w": jnp.asarray(value, jnp.float32)}
        tx = _subspace(0.05, side=side, rank=12, axes=of)
        clipped[name] = np.asarray(tx.update(grads, tx.init(grads))[0]["w"])
    tensor = clipped["tensor"].transpose(2, 0, 1).reshape(12, 15)
    np.testing.assert_allclose(tensor, clipped["matrix"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(24, 40), (3, 24, 40)])
@pytest.mark.parametrize("side", ["left", "right"])
# Products with several vectors convert it on CPUs, as those with the basis.
@pytest.mark.parametrize(("count", "platform"), [(1, "cpu"), (1, "cuda"), (3, "cuda")])
def test_a_gradient_in_bfloat16_is_not_converted_for_a_product(side, shape, count, platform):
    params = {"w": jnp.ones(shape, jnp.bfloat16)}
    in_float32 = f"{'x'.join(map(str, shape))}xf32>"

    def products(limit):
        tx = _subspace(limit, "fisher", count, side=side)
        traced = jax.jit(tx.update).trace(params, tx.init(params))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        return sum(in_float32 in line.partition(" : ")[2].partition("->")[0] for line in lines)

    assert products(0.1) == products(None)


@pytest.mark.parametrize("limit", [0, -1.0, "0.2"])
def test_singular_limit_must_be_a_positive_number(limit):
    with pytest.raises((TypeError, ValueError), match="singular_limit must be"):
        ng.project_back(singular_limit=limit)


@pytest.mark.parametrize("factory", [ng.natural_galore_adamw, ng.lean_natural_galore_adamw])
def test_hidden_matrices_that_are_too_small_to_be_projected_are_clipped_too(factory):
    params = {"mlp": jnp.zeros((64, 256)), "small": jnp.zeros((8, 256))}
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = factory(1.0, rank=16).update(grads, factory(1.0, rank=16).init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates["small"], 2), 0.2 * np.sqrt(256), rtol=1e-5)


def test_a_vector_that_is_selected_is_an_error_of_init():
    with pytest.raises(ValueError, match="bias: a matrix needs at least two axes"):
        ng.clip_leading_singular_value(where=True).init({"bias": jnp.ones(3)})
