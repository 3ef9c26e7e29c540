"""Compositions of the parts: chains, inner optimizers, one subspace after another."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replay import replay

import natgalore_jax as ng

RANK = 2
PARAMS = {"wide": (6, 8), "tall": (9, 5), "b": (8,)}
LOW_RANK = {"wide": (2, 8), "tall": (9, 2), "b": (8,)}
STEPS = 5


def normal(seed, *leading):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(*leading, *s)).astype(np.float32) for k, s in PARAMS.items()}


def project(**settings):
    return ng.low_rank_project(**{"rank": RANK, "update_interval": 3, **settings})


def mu_shapes(tx):
    return jax.tree.map(jnp.shape, optax.tree.get(tx.init(normal(0)), "mu"))


def assert_same_trajectory(tx, other, rtol=1e-5, atol=1e-6):
    args = normal(0), normal(1, STEPS)
    trajectory = replay(tx, *args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
        trajectory,
        replay(other, *args),
    )
    return trajectory


def composition(factory, **given):
    """The chain that the docstring of a ready-made optimizer says it is, with these arguments."""
    text = inspect.cleandoc(factory.__doc__).split(" this composition", 1)[1]
    block = text.split("::\n\n", 1)[1].split("\n\n", 1)[0]
    values = {k: p.default for k, p in inspect.signature(factory).parameters.items()}
    return eval(inspect.cleandoc(block), {"ng": ng, "optax": optax, "jax": jax, **values, **given})


READY_MADE = [
    (ng.natural_galore_adamw, {"residual_scale": 0.3, "unprojected_ratio": 2.0, "scale": 0.5}),
    (ng.natural_galore_adamw, {"side": "both", "residual": "fira", "b1": 0.8, "eps": 1e-4}),
    (ng.natural_galore_adamw, {"basis_dtype": "int8", "seed": 3, "residual": "none"}),
    (ng.lean_natural_galore_adamw, {"side": "both", "b1": 0.8, "b2": 0.9, "eps": 1e-4, "seed": 3}),
    (ng.galore_adamw, {"residual": "fira", "side": "long", "b2": 0.9}),
    (ng.galore_adamw, {"method": "svd", "stagger": False, "scale": 0.5}),
    (ng.paper_natural_galore_adamw, {"history": 3, "damping": 0.1}),
    (ng.contrib.apollo_adamw, {"granularity": "tensor", "norm_growth_limit": None}),
    (ng.contrib.apollo_mini_adamw, {}),
    (ng.contrib.ldadamw, {"error_feedback": True}),
    (ng.contrib.scale_sgd, {"head": {"wide": True, "tall": False, "b": False}, "momentum": 0.5}),
    (ng.contrib.alice_adamw, {"leading": 1, "b3": 0.5, "compensation_scale": 2.0, "seed": 3}),
    (ng.contrib.alice_adamw, {"b1": 0.5, "b2": 0.8, "eps": 1e-3, "norm_growth_limit": None}),
    (ng.contrib.racs_adamw, {"decay": 0.5, "iterations": 2, "scale": 2.0}),
    (ng.contrib.racs_adamw, {"norm_growth_limit": None, "b2": 0.9, "eps": 1e-3}),
    (ng.contrib.scale_sgd, {"norm": "l2", "vector_ratio": 2.0, "b1": 0.8, "eps": 1e-3}),
]


@pytest.mark.parametrize(("factory", "settings"), READY_MADE)
def test_a_ready_made_optimizer_is_the_composition_in_its_docstring(factory, settings):
    settings = {"learning_rate": 0.1, **settings}
    names = inspect.signature(factory).parameters
    defaults = {"rank": RANK, "update_interval": 3, "weight_decay": 0.1}
    settings |= {k: v for k, v in defaults.items() if k in names}
    moved = assert_same_trajectory(factory(**settings), composition(factory, **settings))
    assert all(np.abs(np.diff(x, axis=0)).max() > 1e-3 for x in jax.tree.leaves(moved))


_FACTORIES = {factory.__name__: factory for factory, _ in READY_MADE}


@pytest.mark.parametrize("factory", _FACTORIES.values(), ids=_FACTORIES)
def test_a_ready_made_optimizer_has_at_most_18_arguments(factory):
    assert len(inspect.signature(factory).parameters) <= 18


def test_the_rate_of_what_is_not_projected():
    params = {
        "embed": {"embedding": jnp.ones((9, 8))},
        "mlp": {"up": jnp.ones((8, 12)), "down": jnp.ones((12, 8)), "bias": jnp.ones(8)},
    }
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

    def first_update(**settings):
        tx = ng.natural_galore_adamw(0.1, rank=2, weight_decay=0.0, **settings)
        return tx.update(grads, tx.init(params), params)[0]

    adam = optax.adam(0.1, nesterov=True)
    adam, _ = adam.update(grads, adam.init(params))
    only_up = {"embed": False, "mlp": {"up": True, "down": False, "bias": False}}
    for where in (ng.hidden_matrices, only_up):
        updates = first_update(where=where, unprojected_ratio=3.0)
        for path in (("embed", "embedding"), ("mlp", "bias")):
            np.testing.assert_allclose(
                updates[path[0]][path[1]], 3 * adam[path[0]][path[1]], rtol=1e-5
            )
        one = first_update(where=where, unprojected_ratio=1.0)
        np.testing.assert_array_equal(updates["mlp"]["up"], one["mlp"]["up"])
        # A hidden matrix that is not projected keeps the rate of hidden matrices.
        np.testing.assert_array_equal(updates["mlp"]["down"], one["mlp"]["down"])
    # An embedding that is projected has it too.
    everything = {"embed": True, "mlp": {"up": True, "down": True, "bias": False}}
    projected, same = (
        first_update(where=everything, unprojected_ratio=r)["embed"] for r in (1.0, 3.0)
    )
    jax.tree.map(np.testing.assert_array_equal, projected, same)
    with pytest.raises(TypeError, match="unprojected_ratio must be a number"):
        ng.natural_galore_adamw(0.1, unprojected_ratio="4")


def test_natural_galore_opens_a_subspace_in_ng_chain_alone():
    natural = {"rank": RANK, "update_interval": 3, "history": 2, "damping": 0.1}
    low = ng.chain(ng.natural_galore(**natural), optax.adamw(0.1))
    full = optax.chain(ng.natural_galore(**natural), optax.adamw(0.1))
    assert mu_shapes(low) == LOW_RANK
    assert mu_shapes(full) == PARAMS
    parts = ng.chain(
        project(), ng.woodbury_natural_gradient(history=2, damping=0.1), optax.adamw(0.1)
    )
    assert_same_trajectory(low, parts)
    closed = ng.chain(
        project(), ng.woodbury_natural_gradient(history=2, damping=0.1), ng.project_back()
    )
    assert_same_trajectory(full, optax.chain(closed, optax.adamw(0.1)))


INNER = {
    "adam": (optax.adam(0.1), ("mu", "nu")),
    "adamw": (optax.adamw(0.1, weight_decay=0.1), ("mu", "nu")),
    "amsgrad": (optax.amsgrad(0.1), ("mu", "nu", "nu_max")),
    "lion": (optax.lion(0.1), ("mu",)),
    "momentum": (optax.sgd(0.1, momentum=0.9), ("trace",)),
    "rmsprop": (optax.rmsprop(0.1, momentum=0.9), ("nu", "trace")),
    "muon": (optax.contrib.muon(0.1), ()),
    "adafactor": (optax.adafactor(0.1, min_dim_size_to_factor=2), ()),
}


# All of Optax's optimizers and transitions: tests/test_inner_optimizers.py.
@pytest.mark.parametrize(
    ("name", "transition"),
    [*((name, "rotate") for name in INNER), ("adafactor", "reset"), ("adafactor", "keep")],
)
def test_inner_optimizers_have_low_rank_states_and_survive_refreshes(name, transition):
    inner, fields = INNER[name]
    tx = ng.chain(project(transition=transition), inner, ng.project_back())
    state = jax.eval_shape(tx.init, normal(0))
    for field in fields:
        assert jax.tree.map(jnp.shape, optax.tree.get(state, field)) == LOW_RANK
    trajectory = replay(tx, normal(0), normal(1, STEPS))
    for x in jax.tree.leaves(trajectory):
        assert np.isfinite(x).all() and (np.diff(x, axis=0) != 0).any()


def test_adafactor_and_muon_see_the_low_rank_shapes():
    tx = ng.chain(project(), optax.adafactor(0.1, min_dim_size_to_factor=2))
    state = tx.init(normal(0))
    rows, cols = optax.tree.get(state, "v_row"), optax.tree.get(state, "v_col")
    assert {rows["wide"].shape, cols["wide"].shape} == {(2,), (8,)}
    assert {rows["tall"].shape, cols["tall"].shape} == {(2,), (9,)}
    tx = ng.chain(project(), optax.contrib.muon(0.1))
    shapes = {x.shape for x in jax.tree.leaves(tx.init(normal(0))[1])}
    assert {(2, 8), (9, 2)} <= shapes and not {(6, 8), (9, 5)} & shapes


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_at_full_rank_a_linear_inner_optimizer_is_itself(optimizer, side):
    """Rotated, a momentum means the same in every basis of the whole space."""
    args = {"rank": 9, "side": side, "transition": "rotate", "where": {"w": True, "b": False}}
    rng = np.random.default_rng(0)
    params = {"w": np.zeros((9, 9), np.float32), "b": np.zeros(9, np.float32)}
    grads = {k: rng.normal(size=(8, *v.shape)).astype(np.float32) for k, v in params.items()}
    tx = ng.chain(ng.low_rank_project(update_interval=3, **args), optimizer, ng.project_back())
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
        replay(tx, params, grads),
        replay(optimizer, params, grads),
    )


def test_two_subspaces_in_a_row():
    first, second = project(side="left"), project(side="right")
    tx = ng.chain(
        first, optax.trace(0.9), ng.project_back(), second, optax.scale_by_adam(), ng.project_back()
    )
    outer = optax.chain(
        ng.chain(first, optax.trace(0.9), ng.project_back()),
        ng.chain(second, optax.scale_by_adam(), ng.project_back()),
    )
    assert_same_trajectory(tx, outer)
    state = tx.init(normal(0))
    assert state[1].trace["tall"].shape == (2, 5)
    assert state[4].mu["tall"].shape == (9, 2)


def test_a_nested_subspace_is_an_error():
    for inner in (project(), ng.natural_galore(rank=RANK)):
        with pytest.raises(ValueError, match="a subspace is open already"):
            ng.chain(project(), inner)


def test_project_back_needs_a_subspace():
    with pytest.raises(ValueError, match="project_back has no subspace to close"):
        ng.chain(optax.scale_by_adam(), ng.project_back())
    with pytest.raises(ValueError, match="closes a subspace and there is none here"):
        ng.project_back().init(normal(0))


def test_arguments_of_project_back_are_given_once():
    with pytest.raises(ValueError, match="give them to one of the two"):
        ng.chain(ng.natural_galore(rank=RANK, scale=0.5), ng.project_back())


def test_stock_chain_names_ours():
    tx = optax.chain(project(), optax.scale_by_adam(), ng.project_back())
    with pytest.raises(ValueError, match=r"natgalore_jax\.chain"):
        tx.init(normal(0))


def test_chain_without_a_subspace_is_that_of_optax():
    members = optax.clip_by_global_norm(0.5), optax.scale_by_adam(), optax.scale(-0.1)
    assert_same_trajectory(ng.chain(*members), optax.chain(*members), rtol=0, atol=0)


def test_woodbury_outside_of_a_subspace_acts_on_every_leaf_at_full_size():
    tx = ng.woodbury_natural_gradient(history=2, damping=0.5, damping_mode="absolute")
    grads = normal(1, 2)
    state = tx.init(normal(0))
    for t in range(2):
        natural, state = tx.update({k: g[t] for k, g in grads.items()}, state)
    for name, g in grads.items():
        H = g.reshape(2, -1).T.astype(np.float64)
        F = 0.5 * np.eye(len(H)) + H @ H.T
        expected = np.linalg.solve(F, H[:, 1]).reshape(g.shape[1:])
        np.testing.assert_allclose(natural[name], expected, rtol=1e-4, atol=1e-6)


def test_woodbury_inside_leaves_other_parameters_alone():
    tx = ng.chain(project(), ng.woodbury_natural_gradient(history=2))
    grads = normal(1)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["b"], grads["b"])


def test_weight_decay_acts_on_the_whole_weight():
    settings = {"rank": RANK, "scale": 0.25}
    params, grads = normal(0), normal(1)
    with_decay, without = (ng.galore_adamw(0.1, weight_decay=w, **settings) for w in (0.5, 0.0))
    u, _ = with_decay.update(grads, with_decay.init(params), params)
    v, _ = without.update(grads, without.init(params), params)
    for name in PARAMS:
        np.testing.assert_allclose(u[name] - v[name], -0.1 * 0.5 * params[name], atol=1e-6)


def test_params_inside_are_projected():
    seen = []

    def update(updates, state, params=None):
        seen.append(params)
        return updates, state

    spy = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    tx = ng.chain(project(), spy, ng.project_back())
    params = normal(0)
    _, state = tx.update(normal(1), tx.init(params), params)
    P = state[0].basis[0]["wide"]
    np.testing.assert_allclose(seen[0]["wide"], P.T @ params["wide"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen[0]["b"], params["b"])


def test_forward_mode_gives_the_derivative_by_the_learning_rate():
    """Through three steps and a refresh, against central differences."""
    x, y = (jnp.asarray(np.random.default_rng(i).standard_normal((16, 6))) for i in range(2))

    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)

    def loss_after(learning_rate):
        tx = ng.chain(
            ng.low_rank_project(rank=2, update_interval=2),
            optax.scale_by_adam(),
            ng.project_back(residual="fisher"),
            optax.scale(-learning_rate),
        )
        params = {"w": jnp.asarray(np.random.default_rng(2).standard_normal((6, 6)) / 4)}
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return loss(params)

    value, derivative = jax.jit(lambda rate: jax.jvp(loss_after, (rate,), (1.0,)))(0.02)
    low, high = map(jax.jit(loss_after), (0.018, 0.022))
    assert low > value > high
    np.testing.assert_allclose(derivative, (high - low) / 0.004, rtol=1e-2)
