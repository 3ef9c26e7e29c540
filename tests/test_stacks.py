"""Small equal parameters are computed as one stack, with the numbers of each alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tolerances import PARAMETERS

import natgalore_jax as ng
from benchmarks.optimizer import compile_time
from benchmarks.optimizer.compile_time import equations
from natgalore_jax._src.kernels import stacks
from natgalore_jax._src.refresh import refresh

pytestmark = pytest.mark.usefixtures("fast_compile")

SETTINGS = {"rank": 3, "update_interval": 2}
OPTIMIZERS = {
    "galore": lambda: ng.galore_adamw(0.01, **SETTINGS),
    "natural": lambda: ng.natural_galore_adamw(0.01, **SETTINGS),
    "two sides": lambda: ng.natural_galore_adamw(0.01, **SETTINGS, side="both"),
    "lean": lambda: ng.lean_natural_galore_adamw(0.01, **SETTINGS),
    "history": lambda: composed_adamw(
        "stored", 0.01, **SETTINGS, history=2, damping=0.1, basis_dtype="int4", history_dtype="int8"
    ),
    "reset, random": lambda: ng.chain(
        ng.low_rank_project(**SETTINGS, method="gaussian", transition="reset"),
        optax.scale_by_adam(),
        ng.project_back(residual="fira"),
        optax.scale(-0.01),
    ),
    "clipped AdamW": lambda: optax.chain(
        optax.scale_by_adam(), ng.clip_leading_singular_value(), optax.scale(-0.01)
    ),
    "moments in 8 bits": lambda: optax.chain(
        ng.quantize_state(optax.scale_by_adam(), block_size=32, min_size=32), optax.scale(-0.01)
    ),
    "racs": lambda: ng.contrib.racs_adamw(0.01),
    "apollo": lambda: ng.contrib.apollo_adamw(0.01, **SETTINGS),
    "alice": lambda: ng.contrib.alice_adamw(0.01, **SETTINGS),
    "ldadam": lambda: ng.contrib.ldadamw(0.01, rank=3, error_feedback=True),
}
# Four matrices in one stack, two stacks of layers in another, parameters of which there is one, and
# a matrix too small for the rank.
SHAPES = {
    **{f"w{i}": (8, 12) for i in range(4)},
    **{f"layers{i}": (2, 12, 6) for i in range(2)},
    "alone": (16, 8),
    "small": (3, 8),
    "b0": (8,),
    "b1": (8,),
}
STEPS = 5


def start():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}


def loss(params, scale=1.0):
    return sum(
        jnp.sum(jnp.sin((i + 1) * scale * x) ** 2)
        for i, x in enumerate(map(params.get, sorted(params)))
    )


def train(tx, params, loss=loss, jit=jax.jit):
    """Parameters and state after some steps."""

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    step, state = jit(step), tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


@functools.cache
def stacked(kind):
    return train(OPTIMIZERS[kind](), start())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_same_numbers_as_alone(kind, monkeypatch):
    params, state = stacked(kind)
    monkeypatch.setattr(stacks, "MAX_BYTES", 0)
    monkeypatch.setattr(refresh, "PROGRAM_SHARE", 0)
    params_alone, state_alone = train(OPTIMIZERS[kind](), start())
    compare(params, params_alone)
    assert jax.tree.structure(state) == jax.tree.structure(state_alone)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(state_alone), strict=True):
        assert jax.typeof(x) == jax.typeof(y)


@pytest.mark.parametrize("kind", ["natural", "two sides", "lean", "reset, random"])
def test_same_numbers_when_only_gradients_are_too_large(kind, monkeypatch):
    expected, _ = stacked(kind)
    # Low-rank arrays of the four matrices and of the layers make stacks; their gradients do not.
    monkeypatch.setattr(stacks, "MAX_BYTES", 160)
    compare(train(OPTIMIZERS[kind](), start())[0], expected)


def test_products_of_large_gradients_are_all_that_is_not_a_stack(monkeypatch):
    """An additional matrix adds few reductions, those of its gradient."""

    def reductions(number):
        tx = ng.natural_galore_adamw(0.01, rank=3)
        params = {f"{i}": jnp.zeros((8, 12)) for i in range(number)}
        traced = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        return str(traced).count(" reduce_sum[")

    monkeypatch.setattr(stacks, "MAX_BYTES", 160)
    monkeypatch.setattr(refresh, "PROGRAM_SHARE", 1)
    assert reductions(4) - reductions(3) == 3  # Its columns' squares, two products with vectors


@pytest.mark.parametrize("kind", ["natural", "two sides", "history", "reset, random"])
def test_one_refresh_program_of_parameters_that_are_no_stack(kind, monkeypatch):
    expected, _ = stacked(kind)
    monkeypatch.setattr(stacks, "MAX_BYTES", 0)
    monkeypatch.setattr(refresh, "PROGRAM_SHARE", 1)
    compare(train(OPTIMIZERS[kind](), start())[0], expected)


def test_large_parameters_share_refresh_programs():
    """One for each kind, and one more for each 16th of all bytes."""

    def loops(number):
        tx = ng.galore_adamw(0.01, rank=8, update_interval=2)
        params = {f"{i}": jnp.zeros((256, 1024)) for i in range(number)}
        traced = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        return str(traced).count("name=_refresh_kind")

    assert loops(8) == 8
    assert loops(64) == 16


def test_same_numbers_without_jit():
    tx = OPTIMIZERS["natural"]()
    compare(stacked("natural")[0], train(tx, start(), jit=lambda step: step)[0])


def test_a_stack_has_at_most_max_bytes(monkeypatch):
    operands = [jnp.zeros((8, 12)) for _ in range(5)]
    monkeypatch.setattr(stacks, "MAX_BYTES", operands[0].nbytes // 2)
    assert stacks.kinds([0] * 5, operands) == [[0, 1], [2, 3], [4]]
    # Another shape, dtype, tree or setting is another kind.
    others = [jnp.zeros((12, 8)), jnp.zeros((8, 12), jnp.bfloat16), (operands[0],), operands[0]]
    assert len(stacks.kinds([0, 0, 0, 0, 1], [operands[0], *others])) == 5


def test_stacks_of_small_arrays_are_larger():
    small, larger = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2**11, 2**12))
    assert len(stacks.kinds([0] * 257, [small] * 257)) == 2
    assert len(stacks.kinds([0] * 257, [larger] * 257)) == 9


@pytest.mark.parametrize("length", [1, 2, 7])
def test_unstack_is_the_inverse_of_stack(length):
    trees = [{"x": jnp.full((2, 3), i), "y": (jnp.float32(i),)} for i in range(length)]
    found = jax.jit(lambda trees: stacks.unstack(stacks.stack(trees), length))(trees)
    jax.tree.map(np.testing.assert_array_equal, found, trees)


def test_xla_does_not_know_the_indices_of_slices():
    x = jnp.zeros((8, 4, 5))
    text = jax.jit(lambda x: stacks.unstack(jnp.sin(x), 8)).lower(x).compile().as_text()
    # A constant one would make a kernel of every slice.
    assert text.count(" dynamic-slice(") > 0 and " slice(" not in text


@pytest.mark.parametrize("name", compile_time.OPTIMIZERS)
def test_an_additional_matrix_takes_few_equations(name):
    def traced(tx, number):
        params = {f"{i}": jnp.zeros((32, 48)) for i in range(number)}
        return equations(jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr)

    tx, adamw = compile_time.OPTIMIZERS[name](), optax.adamw(0.01)
    of_tx, of_adamw = ((traced(x, 40) - traced(x, 10)) / 30 for x in (tx, adamw))
    assert of_tx < 46  # 43.2 with jax 0.10, 45.2 with 0.12, for the default
    assert of_tx < 3 * of_adamw


def test_vmap_over_models():
    tx = OPTIMIZERS["natural"]()
    models = [jax.tree.map(lambda x, c=c: c * x, start()) for c in (1.0, 0.5)]
    together, _ = jax.vmap(lambda params: train(tx, params))(stacks.stack(models))
    for i, params in enumerate(models):
        compare(jax.tree.map(lambda x, i=i: x[i], together), train(tx, params)[0])


@pytest.mark.parametrize(
    "kind, axis_type",
    [
        ("natural", AxisType.Auto),
        *((kind, AxisType.Explicit) for kind in ("natural", "racs", "apollo", "alice", "ldadam")),
    ],
)
def test_equal_shapes_in_different_shardings(kind, axis_type):
    tx = OPTIMIZERS[kind]()
    expected, _ = stacked(kind)
    mesh = jax.make_mesh((2, 2), ("x", "y"), (axis_type,) * 2, devices=jax.devices()[:4])
    specs = {"w0": P("x", None), "w1": P(None, "x"), "w2": P("y", "x"), "w3": P("x", None)}
    specs |= {"layers0": P(None, "x"), "layers1": P(None, "x")}
    with jax.set_mesh(mesh):
        params = {
            n: jax.device_put(x, NamedSharding(mesh, specs.get(n, P()))) for n, x in start().items()
        }
        params, _ = train(tx, params)
    compare(params, expected)


def test_shard_map_with_different_gradients():
    tx = OPTIMIZERS["natural"]()
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])

    def run(scale, params):
        return train(tx, params, lambda p: jax.lax.pmean(loss(p, scale[0]), "data"))[0]

    scales = jnp.asarray([0.5, 0.8, 1.0, 1.2])
    found = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P()))(
        scales, start()
    )
    mean, _ = train(tx, start(), lambda p: sum(loss(p, s) for s in scales) / 4)
    compare(found, mean)


@pytest.mark.parametrize(
    "check",
    [
        test_vmap_over_models,
        test_shard_map_with_different_gradients,
        test_same_numbers_without_jit,
        functools.partial(test_equal_shapes_in_different_shardings, "natural", AxisType.Auto),
        functools.partial(test_equal_shapes_in_different_shardings, "natural", AxisType.Explicit),
    ],
)
def test_gradients_too_large_for_a_stack_elsewhere(check, monkeypatch):
    stacked("natural")
    monkeypatch.setattr(stacks, "MAX_BYTES", 160)
    check()


def compare(found, expected):
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, **PARAMETERS, err_msg=name)
