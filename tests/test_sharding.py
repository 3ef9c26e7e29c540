"""Parameters sharded over eight simulated devices by any scheme, against one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from collectives import collectives
from composed import composed_adamw
from jax.sharding import AxisType, NamedSharding
from tolerances import PARAMETERS

import natgalore_jax as ng
from natgalore_jax._src.kernels.projection import contract

STEPS, LEARNING_RATE = 20, 0.01
RANK = 4
# A stack that eight devices divide and one that they do not, three alike, one alone, a vector.
SHAPES = {
    "stack": (8, 16, 32),
    "odd": (6, 32, 16),
    "q": (16, 16),
    "k": (16, 16),
    "v": (16, 16),
    "alone": (16, 32),
    "bias": (32,),
}
ONE_AXIS, TWO_AXES = ((8,), ("x",)), ((2, 4), ("d", "m"))


def _matrix_spec(rows, columns):
    return lambda shape: jax.P(*[None] * (len(shape) - 2), rows, columns)


SCHEMES = {
    "rows": (ONE_AXIS, _matrix_spec("x", None)),
    "columns": (ONE_AXIS, _matrix_spec(None, "x")),
    "layers": (
        ONE_AXIS,
        lambda shape: jax.P("x") if shape[0] == 8 else _matrix_spec(None, "x")(shape),
    ),
    "rows and columns": (TWO_AXES, _matrix_spec("d", "m")),
    "mixed": (
        TWO_AXES,
        lambda shape: jax.P("d", None, "m") if len(shape) == 3 else jax.P(("m", "d"), None),
    ),
}
SETTINGS = {"rank": RANK, "update_interval": 6}
CLIPPED = {"singular_limit": 0.2, "singular_values": 2}
OPTIMIZERS = {
    "default": lambda: ng.natural_galore_adamw(LEARNING_RATE / 4, **SETTINGS),
    "galore": lambda: ng.galore_adamw(LEARNING_RATE, **SETTINGS),
    "exact": lambda: composed_adamw(
        *("none", LEARNING_RATE),
        **SETTINGS,
        side="left",
        method="eigh",
        stagger=False,
        transition="rotate",
    ),
    # Without Adam: in r × r numbers its quotients amplify an error of 1e-7 to 1e-3 in 20 steps.
    "both sides": lambda: ng.chain(
        ng.low_rank_project(**SETTINGS, side="both"),
        optax.trace(0.9),
        ng.project_back(residual="fira"),
        optax.scale_by_learning_rate(LEARNING_RATE),
    ),
    "history": lambda: composed_adamw(
        "stored", LEARNING_RATE / 4, **SETTINGS, history=3, damping=0.1, residual="fira"
    ),
    "eight bits": lambda: ng.natural_galore_adamw(
        LEARNING_RATE / 4, **SETTINGS, moment_bits=8, basis_dtype="int8"
    ),
    "random": lambda: ng.galore_adamw(LEARNING_RATE, **SETTINGS, method="gaussian"),
    "reset": lambda: composed_adamw(
        *("compact", LEARNING_RATE / 4),
        **SETTINGS,
        side="right",
        transition="reset",
        method="randomized",
        residual="fisher",
        **CLIPPED,
    ),
}
EVERY_SCHEME = [("default", scheme) for scheme in SCHEMES]
# "random" is GaLore with another basis.
EVERY_OPTIMIZER = [(name, "mixed") for name in OPTIMIZERS if name not in ("default", "galore")]


@functools.cache
def start():
    """Parameters, and gradients with a clear dominant subspace that turns a little.

    With other seeds a change of gradients by 2⁻²⁴ changes which entries of an update are cautious.
    """
    rng = np.random.default_rng(8)
    params, grads = {}, {}
    for name, shape in SHAPES.items():
        params[name] = rng.normal(size=shape).astype(np.float32)
        g = rng.normal(size=(STEPS, *shape))
        if len(shape) > 1:
            left = rng.normal(size=(*shape[:-1], RANK)) * 2.0 ** -np.arange(RANK)
            right = rng.normal(size=(*shape[:-2], RANK, shape[-1]))
            g = left @ right + 0.05 * g
        grads[name] = g.astype(np.float32)
    return params, grads


def trained(tx, params, grads, state):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(STEPS):
        params, state = step(params, state, {name: g[t] for name, g in grads.items()})
    return params, state


@functools.cache
def on_one_device(name):
    params, grads = start()
    tx = OPTIMIZERS[name]()
    return jax.tree.map(np.asarray, trained(tx, params, grads, tx.init(params))[0])


def placed(scheme, kind):
    """The mesh, and parameters and gradients on it."""
    (sizes, names), spec_of = SCHEMES[scheme]
    mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))
    specs = {
        name: spec_of(shape) if len(shape) > 1 else jax.P(names[-1])
        for name, shape in SHAPES.items()
    }
    params, grads = start()
    params = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in params.items()}
    grads = {
        n: jax.device_put(x, NamedSharding(mesh, jax.P(None, *specs[n]))) for n, x in grads.items()
    }
    return mesh, params, grads


@pytest.mark.parametrize(
    ("name", "scheme", "kind"),
    [(*case, AxisType.Explicit) for case in EVERY_SCHEME + EVERY_OPTIMIZER]
    + [("default", "columns", AxisType.Auto), ("default", "layers", AxisType.Auto)],
)
def test_same_numbers_as_on_one_device(name, scheme, kind):
    mesh, params, grads = placed(scheme, kind)
    tx = OPTIMIZERS[name]()
    with jax.set_mesh(mesh):
        shardings = ng.training.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        new, new_state = trained(tx, params, grads, state)
    if kind == AxisType.Explicit:  # the step has been told no sharding, but keeps them
        assert jax.tree.map(lambda x: x.sharding.spec, new_state) == jax.tree.map(
            lambda x: x.spec, shardings
        )
    for key, expected in on_one_device(name).items():
        assert new[key].sharding.is_equivalent_to(params[key].sharding, expected.ndim)
        np.testing.assert_allclose(
            new[key], expected, **TOLERANCES.get(name, PARAMETERS), err_msg=key
        )


# In eight bits a number on the other side of a rounding boundary differs by a step, 1/127 of the
# largest of its block.
TOLERANCES = {"eight bits": {"rtol": 1e-4, "atol": 2e-2}}


def _bytes_on_one_device(tree):
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_is_divided_like_its_parameters(scheme):
    """An eighth, but for numbers of the size of a rank or a layer."""
    mesh, params, _ = placed(scheme, AxisType.Explicit)
    del params["bias"]
    tx = OPTIMIZERS["history" if scheme == "mixed" else "default"]()
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
    for x in jax.tree.leaves(state):
        if x.size > 8 * 6 * RANK:  # larger than the Fisher entries of a stack
            assert jax.typeof(x).sharding.spec != jax.P(*[None] * x.ndim), x.shape
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    assert _bytes_on_one_device(state) < whole / 8 + 0.05 * whole


def test_specs():
    mesh = jax.make_mesh((2, 2, 2), ("l", "a", "b"), axis_types=(AxisType.Auto,) * 3)

    def sharded(shape, *spec):
        sharding = NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {
        "left": sharded((4, 16, 32), "l", "a", "b"),
        "right": sharded((32, 16), "a", None),
        "indivisible": sharded((16, 18), "a", "b"),
        "bias": sharded((32,), "b"),
    }
    tx = composed_adamw("stored", 0.1, rank=4, history=3, damping=0.1)
    specs = jax.tree.map(lambda s: s.spec, ng.training.state_shardings(tx, params))
    basis, mu = specs[0].basis, optax.tree.get(specs, "mu")
    assert basis[0]["left"] == jax.P("l", ("a", "b"), None)
    assert mu["left"] == jax.P("l", None, ("b", "a"))
    assert specs[1].history.columns["left"] == jax.P("l", None, None, ("b", "a"))
    assert specs[1].history.gram["left"] == jax.P("l", None, None)
    assert specs[2].count == jax.P()
    # The rows survive here, and keep their own; the basis of the columns takes what they leave.
    assert mu["right"] == jax.P("a", None)
    assert basis[1]["right"] == jax.P("a", None)
    # 18 columns are no multiple of four.
    assert mu["indivisible"] == jax.P(None, "b")
    assert mu["bias"] == jax.P("b")


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [(scheme, AxisType.Explicit) for scheme in SCHEMES] + [("layers", AxisType.Auto)],
)
def test_no_device_gathers_more_than_the_matrices_it_factorises(scheme, kind):
    mesh, params, _ = placed(scheme, kind)
    params = {"stack": params["stack"], **{name: params[name] for name in "qkv"}}
    tx = ng.training.with_shardings(ng.galore_adamw(0.1, **SETTINGS), params)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        found = collectives(jax.jit(tx.update).lower(params, state, params).compile())
    layers, m, n = SHAPES["stack"]
    in_subspace = layers * RANK * max(m, n)  # a basis or moment of the stack
    for what, elements in found:
        # What arrives at a device in an exchange of whole matrices is its share of the stack.
        assert elements <= (layers * m * n / 8 if what == "all-to-all" else in_subspace), what
    if scheme == "layers":  # the stack is exchanged with nobody
        single = SHAPES["q"][0] * SHAPES["q"][1]
        assert all(elements <= single for _, elements in found)


def test_a_single_matrix_exchanges_its_small_side_in_a_refresh():
    mesh, params, _ = placed("columns", AxisType.Explicit)
    params = {"alone": params["alone"]}
    tx = ng.galore_adamw(0.1, **SETTINGS)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        found = collectives(jax.jit(tx.update).lower(params, state, params).compile())
    assert max(elements for _, elements in found) <= SHAPES["alone"][0] * RANK


def test_orbax_restores_onto_the_shardings(tmp_path):
    mesh, params, _ = placed("mixed", AxisType.Explicit)
    tx = OPTIMIZERS["default"]()
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    other, elsewhere, _ = placed("columns", AxisType.Auto)
    shardings = ng.training.state_shardings(tx, elsewhere)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", target)
    assert optax.tree.get(restored, "mu")["stack"].sharding.mesh == other
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_with_shardings_outside_of_jit_without_params_and_with_extra_arguments():
    _, params, _ = placed("layers", AxisType.Auto)
    params = {"stack": params["stack"]}
    seen = []

    def update(updates, state, params=None, *, value, value_fn, name):
        assert name == "loss"
        seen.append((jax.typeof(updates["stack"]).sharding.spec, params, value_fn(value)))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    told = ng.training.with_shardings(tx, params)
    updates, _ = told.update(
        params, told.init(params), value=jnp.ones([]), value_fn=lambda x: 2 * x, name="loss"
    )
    assert updates["stack"].sharding.is_equivalent_to(params["stack"].sharding, 3)
    assert seen[0][0] == jax.P("x", None, None) and seen[0][1] is None


def test_callables_among_extra_arguments_compute_on_automatic_axes():
    """A loss of the data around it, on operations that have no rule on explicit axes."""
    params = {"stack": placed("layers", AxisType.Auto)[1]["stack"]}
    data = jax.device_put(params["stack"] + 1.0, params["stack"].sharding)

    def update(updates, state, params=None, *, value_fn, names):
        assert names == ["a", None]
        return jax.tree.map(jnp.add, updates, jax.grad(value_fn)(params, factor=2.0)), state

    def step(tx, params, data):
        def loss(p, factor):
            return factor * jnp.sum(jnp.square(p["stack"] * data).reshape(-1))

        updates, _ = tx.update(params, tx.init(params), params, value_fn=loss, names=["a", None])
        return updates["stack"]

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = ng.training.with_shardings(tx, params)
    w, x = (np.asarray(a, np.float64) for a in (params["stack"], data))
    for run in (step, jax.jit(step, static_argnums=0)):
        np.testing.assert_allclose(run(tx, params, data), w * (1 + 4 * x**2), rtol=1e-5)


def test_errors():
    tx = OPTIMIZERS["galore"]()
    params = {"w": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}}  # without a sharding
    with pytest.raises(ValueError, match=r"NamedSharding.*w/kernel|NamedSharding.*kernel"):
        ng.training.state_shardings(tx, params)
    meshes = [
        jax.make_mesh((n,), ("x",), devices=jax.devices()[:n], axis_types=(AxisType.Auto,))
        for n in (1, 2)
    ]
    shardings = {"a": NamedSharding(meshes[0], jax.P()), "b": NamedSharding(meshes[1], jax.P())}
    with pytest.raises(ValueError, match="one mesh, got 2"):
        ng.training.state_shardings(tx, {"a": jnp.ones((8, 16)), "b": jnp.ones((8, 16))}, shardings)


def test_the_longer_side_is_sharded():
    mesh = jax.make_mesh((2, 4), ("d", "m"), (AxisType.Auto,) * 2)
    shapes = {
        "wide": (8, 16),
        "tall": (16, 8),
        "square": (8, 8),
        "stack": (8, 12, 16),
        "shorter": (8, 18),
        "neither": (6, 18),
        "bias": (8, 16),  # of stacked layers
        "heads": (32, 6, 8),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    axes = dict.fromkeys(shapes) | {"heads": ng.MatrixAxes(0, (1, 2))}

    def specs(*args, **kwargs):
        shardings = ng.training.longer_side_shardings(params, mesh, *args, **kwargs)
        return {name: sharding.spec for name, sharding in shardings.items()}

    over_m = {
        "wide": (None, "m"),
        "tall": ("m",),
        "square": (None, "m"),
        "stack": (None, None, "m"),
        "shorter": ("m",),
        "neither": (),
        "bias": (),
        "heads": (None, None, "m"),
    }
    assert specs("m", axes=axes) == {name: jax.P(*spec) for name, spec in over_m.items()}
    # heads · head_dim, 48, is longer than 32, and has an axis of 8.
    assert specs(axes=axes)["heads"] == jax.P(None, None, ("d", "m"))
    assert specs("d", axes=axes)["heads"] == jax.P(None, "d")
    assert specs()["tall"] == jax.P(("d", "m"))
    with pytest.raises(ValueError, match=r"axis_name must be axes of the mesh, d, m, got \['x'\]"):
        specs("x")


def test_a_state_of_parameters_on_one_device():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    params = jax.device_put(start()[0] | {"absent": None}, device)
    tx = OPTIMIZERS["default"]()
    shardings = ng.training.state_shardings(tx, params)
    assert set(jax.tree.leaves(shardings)) == {device}
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert {x.sharding for x in jax.tree.leaves(state)} == {device}
    assert ng.training.with_shardings(tx, params).update is tx.update
    params["bias"] = jax.device_put(params["bias"], jax.devices()[0])
    with pytest.raises(ValueError, match="NamedSharding for every parameter"):
        ng.training.state_shardings(tx, params)


def test_a_parameter_that_is_none_has_no_sharding():
    """As a bias that is left out, or what Equinox filters."""
    tx, params = ng.galore_adamw(1e-2, rank=2), {"w": jnp.ones((8, 12)), "b": None}
    mesh = jax.make_mesh((4,), ("m",), axis_types=(AxisType.Explicit,))
    shardings = ng.training.longer_side_shardings(params, mesh)
    placed, of_state = jax.device_put(params, shardings), ng.training.state_shardings
    assert of_state(tx, placed) == of_state(tx, params, shardings)
    assert jax.tree.leaves(of_state(tx, {}, shardings["w"]))[0].mesh == mesh
    with jax.set_mesh(mesh):
        state = ng.training.with_shardings(tx, placed).init(placed)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_one_operand_on_explicit_axes_decides_the_sharding_of_a_product():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    G = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, jax.P(None, "x")))
    R = jax.jit(lambda P, G: contract("mr,mn->rn", P, G))(jnp.ones((8, 2)), G)
    assert jax.typeof(R).sharding.spec == jax.P(None, "x")
    np.testing.assert_array_equal(R, np.full((2, 16), 8.0))
