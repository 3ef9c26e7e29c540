"""Errors of wrong arguments and gradients: their type and text, and the state that is kept."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng

PARAMS = {"block": {"w": jnp.ones((6, 8))}, "b": jnp.ones(8)}
INNER = {
    "adam": optax.scale_by_adam(),
    "woodbury": ng.woodbury_natural_gradient(history=2),
}


def everything(path, leaf):
    return True


@pytest.mark.parametrize(
    ("factory", "settings", "error", "message"),
    [
        ("low_rank_project", {"rank": -1}, ValueError, "rank must be at least 1, got -1"),
        ("low_rank_project", {"rank": 0}, ValueError, "rank must be at least 1"),
        ("low_rank_project", {"rank": 2.0}, TypeError, "rank must be an integer, got 2.0"),
        ("low_rank_project", {"rank": True}, TypeError, "rank must be an integer"),
        ("low_rank_project", {"rank": "2"}, TypeError, "rank must be an integer"),
        ("low_rank_project", {"rank": (4,)}, ValueError, "one entry per mode"),
        ("low_rank_project", {"rank": (2, 2)}, ValueError, "(2, 2); a matrix takes one integer"),
        ("natural_galore_adamw", {"learning_rate": 0.1, "rank": [2, 2]}, ValueError, "one integer"),
        ("low_rank_project", {"rank": (4, 0, 2)}, ValueError, "rank must be at least 1"),
        ("low_rank_project", {"update_interval": 0}, ValueError, "update_interval must be at"),
        ("low_rank_project", {"update_interval": 1.5}, TypeError, "update_interval must be an"),
        ("low_rank_project", {"side": "top"}, ValueError, "side must be one of short, long"),
        ("low_rank_project", {"side": None}, TypeError, "side must be one of"),
        ("low_rank_project", {"method": "qr"}, ValueError, "method must be one of power, svd"),
        ("low_rank_project", {"transition": "flip"}, ValueError, "transition must be one of"),
        ("low_rank_project", {"stagger": 1}, TypeError, "stagger must be True or False"),
        ("low_rank_project", {"seed": -1}, ValueError, "seed must be at least 0"),
        ("low_rank_project", {"seed": 2**32}, ValueError, "seed must be at most 4294967295"),
        (
            "low_rank_project",
            {"basis_dtype": jnp.float8_e4m3fn},
            TypeError,
            "basis_dtype must be a floating-point dtype of 16 bits or more, int8 or int4",
        ),
        ("galore_adamw", {"learning_rate": "0.1"}, TypeError, "learning_rate must be a number"),
        (
            "natural_galore_adamw",
            {"learning_rate": 0.1, "weight_decay": "0.1"},
            TypeError,
            "weight_decay must be a number",
        ),
        ("published_galore_adamw", {"learning_rate": 0.1, "b1": 2.0}, ValueError, "b1 must be"),
        (
            "published_natural_galore_adamw",
            {"learning_rate": 0.1, "b2": 1.0},
            ValueError,
            "b2 must be at least 0 and less than 1",
        ),
        ("paper_natural_galore_adamw", {"learning_rate": 0.1, "b1": -1}, ValueError, "b1 must be"),
        (
            "compact_natural_gradient",
            {"inner": 0.97},
            TypeError,
            "inner must be a gradient transformation, got 0.97",
        ),
        (
            "compact_natural_gradient",
            {"inner": optax.scale_by_adam},
            TypeError,
            "inner must be a gradient transformation",
        ),
        ("low_rank_project", {"basis_dtype": jnp.int16}, TypeError, "basis_dtype must be a float"),
        ("low_rank_project", {"basis_dtype": "real"}, TypeError, "basis_dtype must be a float"),
        ("woodbury_natural_gradient", {"history": 0}, ValueError, "history must be at least 1"),
        ("woodbury_natural_gradient", {"history": 2.5}, TypeError, "history must be an integer"),
        ("woodbury_natural_gradient", {"damping": 0.0}, ValueError, "damping must be greater than"),
        ("woodbury_natural_gradient", {"damping": -1}, ValueError, "damping must be greater than"),
        ("woodbury_natural_gradient", {"damping": np.inf}, ValueError, "damping must be less than"),
        ("woodbury_natural_gradient", {"damping": np.nan}, ValueError, "damping must be greater"),
        ("woodbury_natural_gradient", {"damping": "small"}, TypeError, "damping must be a number"),
        ("woodbury_natural_gradient", {"damping_mode": "auto"}, ValueError, "damping_mode must be"),
        (
            "woodbury_natural_gradient",
            {"history_dtype": jnp.int32},
            TypeError,
            "history_dtype must",
        ),
        ("project_back", {"scale": "1"}, TypeError, "scale must be a number"),
        ("project_back", {"scale": np.ones(2)}, TypeError, "scale must be a number"),
        (
            "project_back",
            {"residual": True},
            TypeError,
            "must be one of none, fira, fisher",
        ),
        ("project_back", {"norm_growth_limit": 1.0}, ValueError, "must be greater than 1, got 1.0"),
        ("natural_galore", {"rank": 0}, ValueError, "rank must be at least 1"),
        ("natural_galore", {"history": 0}, ValueError, "history must be at least 1"),
        ("MatrixAxes", {"rows": 0, "cols": 0}, ValueError, "names an axis twice"),
        ("MatrixAxes", {"rows": (), "cols": 0}, ValueError, "at least one axis for rows"),
        ("MatrixAxes", {"rows": 0.5, "cols": 1}, TypeError, "MatrixAxes rows must be an integer"),
    ],
)
def test_wrong_arguments(factory, settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        getattr(ng, factory)(**settings)


# Arguments that would be ignored, by what they are given with.
WITHOUT_EFFECT = [
    ("project_back", {}, {"norm_growth_limit": 1.5, "residual_scale": 0.2, "residual_decay": 0.5}),
    ("project_back", {"residual": "fira"}, {"residual_decay": 0.9}),
    ("natural_galore", {}, {"norm_growth_limit": 2.0, "residual_scale": 1.0}),
    (
        "natural_galore_adamw",
        {"learning_rate": 0.1, "residual": "none"},
        {"residual_scale": 0.8},
    ),
    *(
        (name, {**given, "method": "online"}, {"update_interval": 50, "stagger": True})
        for name, given in [
            ("low_rank_project", {}),
            ("natural_galore", {}),
            ("galore_adamw", {"learning_rate": 0.1}),
        ]
    ),
    ("low_rank_project", {"method": "online"}, {"stagger": False}),
    ("low_rank_project", {"method": "svd"}, {"seed": 1}),
    ("galore_adamw", {"learning_rate": 0.1, "method": "eigh"}, {"seed": 3}),
    ("low_rank_project", {"rank": (2, 2, 2)}, {"side": "left", "axes": ng.MatrixAxes(0, 1)}),
    ("compact_natural_gradient", {}, {"cautious": True}),
]


@pytest.mark.parametrize(
    ("factory", "settings", "name", "value"),
    [(f, settings, *item) for f, settings, unused in WITHOUT_EFFECT for item in unused.items()],
)
def test_an_argument_without_an_effect_is_refused(factory, settings, name, value):
    getattr(ng, factory)(**settings)
    with pytest.raises(ValueError, match=f"{name} has no effect"):
        getattr(ng, factory)(**settings, **{name: value})


@pytest.mark.parametrize(
    "factory",
    [
        ng.scale_by_adam_8bit,
        ng.contrib.scale_by_apollo,
        ng.contrib.scale_by_ldadam,
        ng.contrib.scale_by_racs,
        ng.contrib.scale_by_column_norms,
        ng.contrib.scale_by_alice,
        functools.partial(ng.galore_adamw, 0.1),
        functools.partial(ng.natural_galore_adamw, 0.1),
        functools.partial(ng.lean_natural_galore_adamw, 0.1),
    ],
)
def test_arguments_of_adam_are_checked(factory):
    """Optax takes a decay above one, whose moments grow without bound."""
    for name in ("b1", "b2"):
        for value in (1.0, 2.0, -0.1, np.nan):
            with pytest.raises(ValueError, match=f"{name} must be at least 0 and less than 1"):
                factory(**{name: value})
    with pytest.raises(TypeError, match="eps must be a number"):
        factory(eps="1e-8")
    with pytest.raises(ValueError, match="eps must be a number, got nan"):
        factory(eps=np.nan)
    if "mu_dtype" in inspect.signature(factory).parameters:
        with pytest.raises(TypeError, match="mu_dtype must be a floating-point dtype"):
            factory(mu_dtype=jnp.int8)


def test_clip_mode_needs_a_norm():
    parts = [lambda *x: x] * 3
    with pytest.raises(ValueError, match="clip_mode has no effect without clip_norm"):
        ng.training.per_layer(optax.sgd(0.1), *parts, clip_mode="layer")


def test_what_is_said_though_it_holds_anyway_is_accepted():
    ng.low_rank_project(method="online", update_interval=1)
    ng.project_back(norm_growth_limit=None)
    ng.compact_natural_gradient(cautious=False)
    ng.low_rank_project(method="power", seed=7)  # of the random directions of its probe


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": (2, 2, 2), "where": {"block": True, "b": False}}, ValueError, "shape (6, 8)"),
        ({"where": everything}, ValueError, "b: a matrix needs at least two axes, got shape (8,)"),
        ({"where": lambda path, leaf: False}, ValueError, "block/w (6, 8)"),
        ({"rank": 6}, ValueError, "where selects no parameter to project at rank 6"),
        ({"rank": (2, 2, 2)}, ValueError, "The default rule takes parameters with 3 or more axes"),
        ({"where": {"block": {"w": 1}, "b": False}}, TypeError, "where must be True or False"),
        ({"where": {"block": True}}, ValueError, "where is not a prefix of the tree of parameters"),
        ({"axes": {"block": None}}, ValueError, "axes is not a prefix of the tree of parameters"),
        ({"axes": {"block": (0, 1), "b": None}}, (TypeError, ValueError), "axes"),
        (
            {"axes": {"block": {"w": "rows"}, "b": None}},
            TypeError,
            "block/w: axes must be MatrixAxes, dimension numbers of optax.contrib, or None, got",
        ),
        (
            {"axes": {"block": optax.contrib.MuonDimensionNumbers(0, (0, 1)), "b": None}},
            ValueError,
            "block/w: MuonDimensionNumbers(reduction_axis=0, output_axis=(0, 1)) is no matrix: ",
        ),
        (
            {"axes": {"block": optax.contrib.GaLoreDimensionNumbers(0.5, 1), "b": None}},
            TypeError,
            "block/w: GaLoreDimensionNumbers(reduction_axis=0.5, output_axis=1) is no matrix: ",
        ),
        (
            {"axes": {"block": optax.contrib.MuonDimensionNumbers(0, 2), "b": None}},
            ValueError,
            "block/w: MatrixAxes(rows=(0,), cols=(2,)) is out of range",
        ),
        ({"axes": ng.MatrixAxes(0, 2)}, ValueError, "block/w: MatrixAxes(rows=(0,), cols=(2,)) is"),
        (
            {"axes": ng.MatrixAxes(1, -1)},
            ValueError,
            "block/w: MatrixAxes(rows=(1,), cols=(-1,)) n",
        ),
    ],
)
def test_arguments_that_do_not_fit_the_parameters(settings, error, message):
    tx = ng.chain(ng.low_rank_project(**{"rank": 2, **settings}))
    with pytest.raises(error, match=re.escape(message)):
        tx.init(PARAMS)


def test_axes_that_leave_nothing_to_project_are_named():
    """Among Optax's dimension numbers None leaves a parameter out."""
    axes = {"block": None, "b": optax.contrib.MuonDimensionNumbers(0, 1)}
    message = "axes is None for every parameter that where selects: block/w. Beside dimension"
    for tx in (
        ng.chain(ng.low_rank_project(rank=2, axes=axes)),
        ng.contrib.apollo_adamw(1e-2, rank=2, axes=axes),
        ng.contrib.scale_sgd(1e-2, axes=axes),
    ):
        with pytest.raises(ValueError, match=message):
            tx.init(PARAMS)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_only_real_floating_point_parameters_can_be_projected(dtype):
    params = {"w": jnp.ones((6, 8)), "other": jnp.ones((6, 8), dtype)}
    with pytest.raises(
        TypeError, match=rf"other: only real floating-point.*{dtype.__name__}.*\(6, 8"
    ):
        ng.chain(ng.low_rank_project(rank=2, where=everything)).init(params)
    tx = ng.chain(ng.natural_galore(rank=2))  # the default rule leaves it alone
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["other"], params["other"])
    assert updates["other"].dtype == dtype
    assert not np.allclose(updates["w"], params["w"])


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("with_params", [True, False])
@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({"block": {"w": jnp.ones((7, 8))}}, ["block/w", "(7, 8)", "(6, "]),
        ({"block": {"w": jnp.ones((6, 9))}}, ["block/w", "(6, 9)", ", 8)"]),
        ({"block": {"w": jnp.ones((2, 8))}}, ["block/w", "(2, 8)", "(6, "]),
        ({"block": {"w": jnp.ones((6, 8, 1))}}, ["block/w", "(6, 8, 1)", "(6, "]),
        ({"block": {}}, ["another tree structure", "block/w"]),
        ({"new": jnp.ones((6, 8))}, ["another tree structure", "only in the updates: new"]),
    ],
)
def test_updates_that_differ_from_init(inner, with_params, changed, messages):
    tx = ng.chain(ng.low_rank_project(rank=2), INNER[inner], ng.project_back())
    state = tx.init(PARAMS)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(tx.update, {**PARAMS, **changed}, state, PARAMS if with_params else None)
    for message in messages:
        assert message in str(error.value)


def test_a_transposed_gradient_names_the_side_of_the_basis():
    tx = ng.galore_adamw(0.1, rank=2)
    state = tx.init({"w": jnp.ones((6, 8))})
    with pytest.raises(ValueError, match=r"\(6, 2\) of columns, but .* have \(6, 2\) of rows"):
        tx.update({"w": jnp.ones((8, 6))}, state)


@pytest.mark.parametrize("with_params", [True, False])
def test_a_leaf_that_is_not_projected_is_checked_too(with_params):
    tx = ng.galore_adamw(0.1, rank=2, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"b.*\(7,\).*\(8,\)"):
        tx.update({**PARAMS, "b": jnp.ones(7)}, tx.init(PARAMS), PARAMS if with_params else None)


def test_woodbury_alone_names_the_parameter():
    tx = ng.woodbury_natural_gradient(history=2)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"block/w.*\(6, 9\), .*history.*\(2, 6, 8\)"):
        tx.update({**PARAMS, "block": {"w": jnp.ones((6, 9))}}, state)
    with pytest.raises(ValueError, match=r"another tree structure.*only there: b"):
        tx.update({"block": PARAMS["block"]}, state)


def test_a_state_of_another_chain_is_refused():
    state = ng.chain(ng.low_rank_project(rank=2)).init(PARAMS)
    with pytest.raises(ValueError, match=r"4 states but received 2"):
        ng.chain(ng.natural_galore(rank=2), optax.adam(0.1)).update(PARAMS, state)


def test_a_state_restored_without_a_target_is_refused():
    tx = ng.chain(optax.clip(1.0), ng.low_rank_project(rank=2), optax.scale_by_adam())
    clip, opened, *others = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"state 1 .* type dict .* as the target"):
        tx.update(PARAMS, [clip, opened._asdict(), *others], PARAMS)


def test_a_whole_model_in_the_place_of_its_arrays_is_refused():
    tx = ng.galore_adamw(0.1, rank=2)
    with pytest.raises(TypeError, match=r"activation: parameters must be arrays.*eqx\.filter"):
        tx.update(PARAMS, tx.init(PARAMS), {**PARAMS, "activation": jax.nn.gelu})


def test_not_a_transformation():
    with pytest.raises(TypeError, match=r"chain takes gradient transformations, got 0\.1"):
        ng.chain(ng.low_rank_project(rank=2), 0.1)


def gradients(t, bad=None):
    g = jax.tree.map(lambda w: jax.random.normal(jax.random.key(t), w.shape), PARAMS)
    return g if bad is None else {**g, "block": {"w": g["block"]["w"].at[2, 3].set(bad)}}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["power", "svd", "gaussian", "online", "randomized"])
def test_a_gradient_that_is_not_finite_keeps_the_basis(method, bad):
    # sgd has no memory: whatever is not finite after the bad step comes from the basis.
    interval = 1 if method == "online" else 2
    tx = ng.chain(
        ng.low_rank_project(rank=2, update_interval=interval, method=method), optax.sgd(0.1)
    )
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for t in range(2):
        _, state = update(gradients(t), state)
    _, after = update(gradients(2, bad), state)  # a refresh is due
    np.testing.assert_array_equal(after[0].basis[0]["block"]["w"], state[0].basis[0]["block"]["w"])
    for t in range(3, 6):
        updates, after = update(gradients(t), after)
        assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))
    assert not np.allclose(after[0].basis[0]["block"]["w"], state[0].basis[0]["block"]["w"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])
@pytest.mark.parametrize("damping_mode", ["absolute", "relative"])
def test_a_gradient_that_is_not_finite_does_not_enter_the_history(damping_mode, bad):
    """1e25 is finite, but its square is not."""
    tx = ng.natural_galore(
        rank=2,
        update_interval=3,
        history=4,
        damping=0.1,
        damping_mode=damping_mode,
        residual="fira",
    )
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for t in range(6):
        updates, state = update(gradients(t, bad if t == 1 else None), state)
        finite = bool(jnp.isfinite(updates["block"]["w"]).all())
        assert finite or t == 1, t
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))


def test_a_first_gradient_that_is_not_finite_does_not_spoil_the_residual():
    tx = ng.chain(ng.low_rank_project(rank=2), ng.project_back(residual="fira"))
    _, state = tx.update(gradients(0, np.nan), tx.init(PARAMS))
    updates, _ = tx.update(gradients(1), state)
    # Without an inner transformation φ is one: projection and residual add up to the gradient.
    np.testing.assert_allclose(updates["block"]["w"], gradients(1)["block"]["w"], rtol=1e-4)


@pytest.mark.parametrize("damping", [0.0, -1.0])
def test_a_damping_schedule_at_or_below_zero_is_the_smallest_damping(damping):
    """λ → 0: one gradient gives h/‖h‖², and no gradient gives zero."""
    tx = ng.woodbury_natural_gradient(history=2, damping=lambda count: damping)
    h = {"w": 3.0 * jnp.ones((4, 6)), "zero": jnp.zeros((4, 6))}
    natural, _ = tx.update(h, tx.init(h))
    np.testing.assert_allclose(natural["w"], h["w"] / (9 * 24), rtol=1e-5)
    np.testing.assert_array_equal(natural["zero"], 0)
