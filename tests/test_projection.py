"""Selection of parameters, axes and shapes of their projection."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import updates_of

import natgalore_jax as ng


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def sgd_inside(residual="none", **settings):
    back = ng.project_back(residual=residual)
    return ng.chain(ng.low_rank_project(**settings), optax.trace(0.9), back)


def low_rank_shapes(tx, params):
    trace = tx.init(params)[1].trace
    return jax.tree.map(lambda x: x.shape, trace)


@pytest.mark.parametrize("side", ["left", "right", "both", "short", "long"])
@pytest.mark.parametrize(
    "method, residual", [("svd", "none"), ("power", "none"), ("power", "fira")]
)
def test_several_axes_on_one_side_are_one_long_side(side, method, residual):
    """An attention kernel (embed, heads, head_dim) is the matrix (embed, heads · head_dim)."""
    kernels = [{"q": normal(10, 3, 4, seed=t)} for t in range(5)]
    outs = [{"q": g["q"].transpose(1, 2, 0)} for g in kernels]
    flat = [{"q": g["q"].reshape(10, 12)} for g in kernels]
    settings = dict(
        rank=4, update_interval=2, side=side, method=method, stagger=False, residual=residual
    )
    as_matrix, _ = updates_of(sgd_inside(**settings), flat)
    axes = ng.MatrixAxes(rows=0, cols=(1, 2))
    as_kernel, _ = updates_of(sgd_inside(axes=axes, **settings), kernels)
    axes = ng.MatrixAxes(rows=-1, cols=(0, 1))  # the output kernel, read as its transpose
    as_output, _ = updates_of(sgd_inside(axes=axes, **settings), outs)
    for a, b, c in zip(as_matrix, as_kernel, as_output, strict=True):
        want = np.asarray(a["q"]).reshape(10, 3, 4)
        np.testing.assert_allclose(b["q"], want, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(c["q"], want.transpose(1, 2, 0), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_tucker_is_the_projection_on_the_dominant_space_of_every_mode(batch):
    ranks, shape = (2, 3, 4), (5, 6, 7)
    G = normal(*batch, *shape)
    tx = ng.chain(ng.low_rank_project(rank=ranks, method="svd", where=lambda p, x: True))
    state = tx.init({"w": G})
    assert [tree["w"].shape for tree in state[0].basis] == [
        (*batch, n, r) for n, r in zip(shape, ranks, strict=True)
    ]
    update, _ = tx.update({"w": G}, state)
    for tensor, got in zip(
        np.asarray(G, np.float64).reshape(-1, *shape),
        np.asarray(update["w"]).reshape(-1, *shape),
        strict=True,
    ):
        want = tensor
        for mode, rank in enumerate(ranks):
            unfolded = np.moveaxis(tensor, mode, 0).reshape(shape[mode], -1)
            U = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
            want = np.moveaxis(np.tensordot(U @ U.T, want, axes=(1, mode)), 0, mode)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_tucker_with_the_default_rule_takes_the_tensors_and_leaves_the_matrices():
    params = {"conv": jnp.ones((3, 3, 8, 8)), "dense": jnp.ones((8, 8)), "b": jnp.ones(8)}
    tx = ng.chain(ng.low_rank_project(rank=(2, 2, 4, 4)), optax.trace(0.9))
    assert low_rank_shapes(tx, params) == {"conv": (2, 2, 4, 4), "dense": (8, 8), "b": (8,)}


def test_rank_is_clipped_to_each_matrix():
    params = {"small": jnp.ones((4, 9)), "large": jnp.ones((20, 30))}
    tx = sgd_inside(rank=16, where=lambda path, leaf: True)
    assert low_rank_shapes(tx, params) == {"small": (4, 9), "large": (16, 30)}
    both = sgd_inside(rank=16, where=lambda path, leaf: True, side="both")
    assert low_rank_shapes(both, params) == {"small": (4, 4), "large": (16, 16)}


PARAMS = {
    "embed": {"embedding": jnp.ones((50, 16))},
    "layers": [{"attention": {"q": jnp.ones((16, 16))}, "mlp": {"up": jnp.ones((16, 24))}}],
    "norms": {"scale": jnp.ones((12, 16))},
    "head": {"kernel": jnp.ones((16, 50))},
}


def projected(where, **settings):
    tx = ng.chain(ng.low_rank_project(rank=4, where=where, **settings))
    basis = tx.init(PARAMS)[0].basis
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for tree in basis
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {path.split("/")[-1] for path in paths}


@pytest.mark.parametrize(
    "where,expected",
    [
        (ng.hidden_matrices, {"q", "up"}),
        (lambda path, leaf: "attention" in path, {"q"}),
        (lambda path, leaf: str(path) == "layers/0/mlp/up", {"up"}),
        (lambda path, leaf: path[-1] == jax.tree_util.DictKey("kernel"), {"kernel"}),
        (lambda path, leaf: "mlp" in jax.tree_util.keystr(path), {"up"}),
        (lambda path, leaf: leaf.shape[1] == 24, {"up"}),
        ({"embed": False, "layers": True, "norms": False, "head": False}, {"q", "up"}),
        (jax.tree.map(lambda x: x.shape == (16, 16), PARAMS), {"q"}),
        (True, {"embedding", "q", "up", "scale", "kernel"}),
    ],
)
def test_where_in_each_of_its_forms(where, expected):
    assert projected(where) == expected


def dimension_numbers(kind):
    return getattr(optax.contrib, f"{kind}DimensionNumbers")


every_kind = pytest.mark.parametrize("kind", ["Muon", "GaLore"])


@every_kind
def test_dimension_numbers_of_optax_in_each_form_of_axes(kind):
    """As the equal MatrixAxes; None is no matrix, as in Optax."""
    numbers = dimension_numbers(kind)
    params = {"q": jnp.ones((9, 3, 10, 2)), "mlp": [jnp.ones((16, 24)), jnp.ones((16, 24))]}
    optax_axes = {"q": numbers(0, [-2, -1]), "mlp": [numbers(), None]}
    native = {"q": ng.MatrixAxes(0, (2, 3)), "mlp": [ng.MatrixAxes(0, 1), ng.MatrixAxes(0, 1)]}
    where = {"q": True, "mlp": [True, False]}
    expected = low_rank_shapes(sgd_inside(rank=4, axes=native, where=where), params)
    assert expected == {"q": (3, 4, 10, 2), "mlp": [(4, 24), (16, 24)]}
    for axes in (optax_axes, lambda params: optax_axes):
        assert low_rank_shapes(sgd_inside(rank=4, axes=axes), params) == expected
    prefix = {"q": numbers(0, (2, 3)), "mlp": None}
    assert low_rank_shapes(sgd_inside(rank=4, axes=prefix), params)["mlp"] == [(16, 24), (16, 24)]
    one = sgd_inside(rank=4, side="left", axes=numbers(reduction_axis=1, output_axis=0))
    assert low_rank_shapes(one, {"a": jnp.ones((20, 8))}) == {"a": (4, 20)}


@every_kind
@pytest.mark.parametrize("around", ["masked", "partition"])
def test_dimension_numbers_that_a_group_does_not_see(kind, around):
    """None is no matrix there too, although no parameter of the group has dimension numbers."""
    params = {"q": jnp.ones((8, 3, 4)), "other": jnp.ones((8, 8)), "up": jnp.ones((8, 24))}
    axes = {"q": dimension_numbers(kind)(0, (1, 2)), "other": None, "up": ng.MatrixAxes(1, 0)}
    tx = sgd_inside(rank=2, axes=axes)
    if around == "masked":
        tx = optax.masked(tx, {"q": False, "other": True, "up": True})
    else:
        labels = {"q": "rest", "other": "ours", "up": "ours"}
        tx = optax.partition({"ours": tx, "rest": optax.sgd(0.1)}, labels)
    trace = optax.tree.get(tx.init(params), "trace")
    assert (trace["other"].shape, trace["up"].shape) == ((8, 8), (24, 2))


@pytest.mark.parametrize(
    "axes",
    [
        {"a": ng.MatrixAxes(rows=1, cols=0), "b": None},
        {"a": ng.MatrixAxes(1, 0), "b": ng.MatrixAxes(-2, -1)},
        lambda params: jax.tree.map(
            lambda x: ng.MatrixAxes(1, 0) if x.shape[0] > x.shape[1] else None, params
        ),
    ],
)
def test_axes_in_each_of_its_forms(axes):
    params = {"a": jnp.ones((20, 8)), "b": jnp.ones((8, 20))}
    tx = sgd_inside(rank=4, side="left", axes=axes)
    assert low_rank_shapes(tx, params) == {"a": (4, 20), "b": (4, 20)}


def test_one_matrix_axes_for_all():
    tx = sgd_inside(rank=4, side="left", axes=ng.MatrixAxes(rows=-1, cols=-2))
    assert low_rank_shapes(tx, {"a": jnp.ones((20, 8)), "s": jnp.ones((3, 9, 8))}) == {
        "a": (4, 20),
        "s": (3, 4, 9),
    }


def test_a_subspace_inside_a_subspace_is_refused():
    inner = ng.galore_adamw(1e-2, rank=2)
    with pytest.raises(ValueError, match="a subspace inside a subspace"):
        ng.chain(ng.low_rank_project(rank=4), inner, ng.project_back())
    hidden = optax.chain(optax.clip(1.0), ng.natural_galore(rank=2))
    tx = ng.chain(ng.low_rank_project(rank=4), hidden, ng.project_back())
    with pytest.raises(ValueError, match="after project_back"):
        tx.init({"w": jnp.ones((6, 8))})


def test_containers_that_differ_are_named():
    tx = ng.galore_adamw(1e-2, rank=2)
    state = tx.init({"layers": [jnp.ones((6, 8))]})
    with pytest.raises(ValueError, match="layers is of type tuple, and there of type list"):
        tx.update({"layers": (jnp.ones((6, 8)),)}, state)
    state = tx.init({"layers": {"1": jnp.ones((6, 8))}})
    with pytest.raises(ValueError, match=r"layers is .*\{1: .*, and there .*\{'1': "):
        tx.update({"layers": {1: jnp.ones((6, 8))}}, state)


def test_the_state_of_the_residual_fits_the_update():
    tx = ng.chain(ng.low_rank_project(rank=2), ng.project_back(residual="fisher"))
    state = tx.init({"w": jnp.ones((6, 8))})
    message = r"w: the update has shape \(6, 12\), .* residual_fisher of shape \(12,\), .* \(8,\)"
    with pytest.raises(ValueError, match=message):
        tx.update({"w": jnp.ones((6, 12))}, state)
