"""An update in three steps: low-rank gradients that are summed, sent, or given directly."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from contract import random_like, signature, zeros

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

STEPS, INTERVAL = 20, 4
SETTINGS = {"rank": 2, "update_interval": INTERVAL}
DECAYED = {**SETTINGS, "weight_decay": 0.1}


def inside(*inner, **settings):
    return ng.chain(
        ng.low_rank_project(**{**SETTINGS, **settings}),
        *inner,
        ng.project_back(scale=0.5),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.05),
    )


OPTIMIZERS = {
    "natural": lambda: ng.natural_galore_adamw(0.0125, **DECAYED, residual="none"),
    "galore, both, rotate, all at once": lambda: composed_adamw(
        "none", 0.05, **DECAYED, side="both", transition="rotate", stagger=False
    ),
    "fira": lambda: ng.galore_adamw(0.05, **DECAYED, residual="fira", side="right"),
    "fisher": lambda: ng.natural_galore_adamw(0.0125, **DECAYED),
    "tucker, svd": lambda: inside(optax.scale_by_adam(), rank=(2, 3, 2), method="svd"),
    "online, lion": lambda: inside(optax.scale_by_lion(), method="online", update_interval=1),
    "decay inside, momentum": lambda: inside(
        optax.add_decayed_weights(0.1), optax.trace(0.9), optax.clip_by_global_norm(1.0)
    ),
    "MultiSteps inside": lambda: inside(
        optax.MultiSteps(optax.adam(1.0), 2), side="long", transition="keep"
    ),
    "natural_galore, history, left, reset": lambda: ng.chain(
        ng.natural_galore(
            **SETTINGS,
            history=3,
            damping=0.1,
            side="left",
            transition="reset",
            basis_dtype="int8",
            history_dtype="int4",
        ),
        optax.adamw(0.05),
    ),
}


def assert_close(actual, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), actual, expected)


def in_steps(tx):
    steps = ng.training.low_rank_steps(tx)

    def update(grads, state, params):
        state = steps.refresh(grads, state)
        low = steps.project(grads, state)
        return steps.update(low, state, params, grads if steps.needs_full else None)

    return update


def trajectory(update, state, params, grads):
    """Parameters after every step, and the last state."""

    def step(carry, g):
        state, params = carry
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (state, params), params

    (state, _), seen = jax.lax.scan(step, (state, params), grads)
    return seen, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_are_the_update(name):
    tx = OPTIMIZERS[name]()
    params = random_like(zeros(), 0)
    grads = random_like(jax.tree.map(lambda p: jnp.zeros((STEPS, *p.shape)), params), 1)
    state = tx.init(params)
    expected = jax.jit(lambda *args: trajectory(tx.update, *args))(state, params, grads)
    actual = jax.jit(lambda *args: trajectory(in_steps(tx), *args))(state, params, grads)
    assert signature(actual) == signature(expected)
    # The same operations, in programs that need not round alike.
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda p, last: bool(jnp.all(p != last[-1])), params, expected[0])
    assert jax.tree.all(moved), moved


def test_project_is_the_product_with_the_bases_and_linear():
    tx = inside(optax.scale_by_adam(), side="right")
    params = random_like(zeros(), 0)
    _, project, *_ = steps = ng.training.low_rank_steps(tx)
    state = jax.jit(steps.refresh)(params, tx.init(params))
    g, h = random_like(params, 1), random_like(params, 2)
    low = project(g, state)
    assert jax.tree.structure(low) == jax.tree.structure(params)
    Q = np.asarray(state[0].basis[1]["dense"]["kernel"], np.float64)
    G = np.asarray(g["dense"]["kernel"], np.float64)
    np.testing.assert_allclose(low["dense"]["kernel"], G @ Q, rtol=1e-5, atol=1e-6)
    Q = np.asarray(state[0].basis[1]["layers"]["kernel"], np.float64)
    G = np.asarray(g["layers"]["kernel"], np.float64)
    expected = np.einsum("lmn,lnr->lmr", G, Q)
    np.testing.assert_allclose(low["layers"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert low["dense"]["bias"] is g["dense"]["bias"]
    of_sum = project(jax.tree.map(lambda a, b: 2 * a - b, g, h), state)
    sum_of = jax.tree.map(lambda a, b: 2 * a - b, low, project(h, state))
    assert_close(of_sum, sum_of, rtol=1e-5, atol=1e-5)


def test_refresh_spans_the_gradient_that_it_is_given_and_does_not_count():
    tx = inside(optax.scale_by_adam(), method="svd", side="left", stagger=False)
    params, g = random_like(zeros(), 0), random_like(zeros(), 1)
    steps, state = ng.training.low_rank_steps(tx), tx.init(params)
    refresh = jax.jit(steps.refresh)
    refreshed = refresh(g, state)
    assert signature(refreshed) == signature(state)
    assert int(refreshed[0].count) == 0
    P = np.asarray(refreshed[0].basis[0]["dense"]["kernel"], np.float64)
    U = np.linalg.svd(np.asarray(g["dense"]["kernel"], np.float64))[0][:, :2]
    np.testing.assert_allclose(P @ P.T, U @ U.T, atol=1e-5)
    # The first step refreshes everything, and the next does not.
    _, later = steps.update(steps.project(g, refreshed), refreshed, params)
    assert int(later[0].count) == 1
    later = later[0]._replace(count=jnp.int32(INTERVAL + 1)), *later[1:]
    assert_close(refresh(params, later), later, rtol=0)


def test_mean_of_low_rank_gradients_is_what_multisteps_inside_the_subspace_takes():
    """Two gradients a step, the first of which decides the basis: there by counting, here by us."""
    parts = [ng.project_back(scale=0.5), optax.scale_by_learning_rate(0.05)]
    twice = ng.low_rank_project(2, 2 * INTERVAL)
    multi = ng.chain(twice, optax.MultiSteps(optax.scale_by_adam(), 2), *parts)
    tx = ng.chain(ng.low_rank_project(2, INTERVAL), optax.scale_by_adam(), *parts)
    steps, params = ng.training.low_rank_steps(tx), random_like(zeros(), 0)
    expected_state, state = multi.init(params), tx.init(params)

    @jax.jit
    def expected_update(first, second, state):
        _, state = multi.update(first, state, params)
        return multi.update(second, state, params)

    @jax.jit
    def update(first, second, state):
        mean = jax.tree.map(lambda low: jnp.full_like(low, 9.0), steps.project(first, state))
        state, mean = steps.accumulate(first, state, mean, jnp.int32(0))
        state, mean = steps.accumulate(second, state, mean, jnp.int32(1))
        return steps.update(mean, state, params)

    for t in range(INTERVAL + 2):
        first, second = random_like(params, 2 * t + 1), random_like(params, 2 * t + 2)
        updates, state = update(first, second, state)
        expected, expected_state = expected_update(first, second, expected_state)
        assert_close(updates, expected, rtol=1e-3, atol=1e-5)


def test_devices_exchange_low_rank_gradients_only():
    devices = 4
    tx = ng.galore_adamw(0.05, **SETTINGS, side="left")
    steps = ng.training.low_rank_steps(tx)
    params = {"w": random_like(jnp.zeros((6, 40)), 0), "b": jnp.zeros(40)}
    batch = jax.random.normal(jax.random.key(1), (8, 6))
    state = tx.init(params)

    def loss(params, batch):
        return jnp.mean(jnp.square(jnp.tanh(batch @ params["w"] + params["b"]) - 1))

    def local(params, state, batch):
        # Otherwise the gradient of replicated parameters would be summed over the devices at once.
        own = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        low = jax.lax.pmean(steps.project(jax.grad(loss)(own, batch), state), "data")
        return steps.update(low, state, params)

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = jax.P(), jax.P("data")
    step = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(replicated, replicated, split),
            out_specs=(replicated, replicated),
        )
    )
    compiled = step.lower(params, state, batch).compile()
    lines = [line for line in compiled.as_text().splitlines() if " all-reduce(" in line]
    reduced = {shape for line in lines for shape in re.findall(r"f32\[([\d,]*)\]", line)}
    assert reduced == {"2,40", "40"}
    grads = jax.grad(loss)(params, batch)
    expected = steps.update(steps.project(grads, state), state, params)
    assert_close(compiled(params, state, batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2], ids=["auto", "explicit"])
def test_devices_of_two_mesh_axes_exchange(kind):
    tx = ng.galore_adamw(0.05, **SETTINGS)
    steps = ng.training.low_rank_steps(tx)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
    params, state = zeros(), tx.init(zeros())
    grads = random_like(jax.tree.map(lambda x: jnp.stack([x] * 4), params), 0)

    def exchanged(grads, state):
        own = jax.tree.map(lambda x: x.squeeze(0), grads)
        return steps.exchange(own, state, ("a", "b"))

    found = jax.jit(
        jax.shard_map(
            exchanged, mesh=mesh, in_specs=(jax.P(("a", "b")), jax.P()), out_specs=jax.P()
        )
    )(jax.device_put(grads, jax.NamedSharding(mesh, jax.P(("a", "b")))), state)
    mean = jax.tree.map(lambda x: jnp.mean(x, 0), grads)
    expected = steps.refresh(mean, state)
    assert_close(found, (expected, steps.project(mean, expected)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_an_accumulated_mean_keeps_its_dtypes(dtypes):
    params, micro_batches = (jax.tree.map(lambda x, t=t: x.astype(t), zeros()) for t in dtypes)
    tx = ng.galore_adamw(0.05, **SETTINGS)
    steps, state = ng.training.low_rank_steps(tx), tx.init(params)
    zero = optax.tree.zeros_like(steps.project(params, state))
    parts = random_like(jax.tree.map(lambda x: jnp.stack([x] * 3), micro_batches), 0)

    def accumulate(carry, part):
        state, mean, position = carry
        return (*steps.accumulate(part, state, mean, position), position + 1), None

    (state, mean, _), _ = jax.lax.scan(accumulate, (state, zero, jnp.int32(0)), parts)
    assert {x.dtype for x in jax.tree.leaves(mean)} == {jnp.dtype(dtypes[0])}
    expected = steps.project(jax.tree.map(lambda x: jnp.mean(x, 0), parts), state)
    assert_close(mean, expected, rtol=0.02, atol=0.02)


PARAMS = {"w": jnp.ones((6, 8)), "b": jnp.ones(8)}


@pytest.mark.parametrize(
    ("tx", "error", "message"),
    [
        (optax.adamw(0.1), TypeError, "takes a result of natgalore_jax.chain"),
        (optax.chain(ng.galore_adamw(0.1, rank=2)), TypeError, "optax.chain"),
        (optax.MultiSteps(ng.galore_adamw(0.1, rank=2), 2), TypeError, "hides the subspace"),
        (ng.low_rank_project(rank=2), TypeError, "takes a result of natgalore_jax.chain"),
        (ng.chain(optax.sgd(0.1)), ValueError, "with one subspace (low_rank_project or natur"),
        (
            ng.chain(ng.natural_galore(2), ng.project_back(), ng.natural_galore(2)),
            ValueError,
            "got one with 2",
        ),
        (
            ng.chain(optax.clip_by_global_norm(1.0), ng.natural_galore(2)),
            ValueError,
            "put them inside, after low_rank_project. optax.clip_by_global_norm",
        ),
    ],
)
def test_what_cannot_be_taken_apart(tx, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ng.training.low_rank_steps(tx)


@pytest.mark.parametrize("residual", ["fira", "fisher"])
def test_a_residual_needs_the_full_gradient(residual):
    tx = ng.galore_adamw(0.1, rank=2, residual=residual)
    steps, state = ng.training.low_rank_steps(tx), tx.init(PARAMS)
    assert (
        steps.needs_full and not ng.training.low_rank_steps(ng.galore_adamw(0.1, rank=2)).needs_full
    )
    low = steps.project(PARAMS, state)
    with pytest.raises(ValueError, match=rf"residual='{residual}'.*full=.*residual='none'"):
        steps.update(low, state, PARAMS)


def test_shapes_are_checked():
    tx = ng.galore_adamw(0.1, rank=2)
    steps, state = ng.training.low_rank_steps(tx), tx.init(PARAMS)
    low = steps.project(PARAMS, state)
    with pytest.raises(ValueError, match=r"w: the low-rank.*\(6, 8\) has shape \(2, 8\).*\(6, 8\)"):
        steps.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="only there: b"):
        steps.update({"w": low["w"]}, state, PARAMS)
    with pytest.raises(ValueError, match="update needs params"):
        steps.update(low, state, None)
    with pytest.raises(ValueError, match=r"b: the update has shape \(7,\)"):
        steps.update(low, state, PARAMS, {"w": PARAMS["w"], "b": jnp.ones(7)})
    for call in (steps.refresh, steps.project):
        with pytest.raises(ValueError, match="has 5 states but received 4"):
            call(PARAMS, state[1:])
        with pytest.raises(ValueError, match=r"w: the update \(float32, \(8, 6\)\) needs bases"):
            call({**PARAMS, "w": PARAMS["w"].T}, state)


@pytest.mark.parametrize("number", [8, 512])
def test_a_mean_of_gradients_in_bfloat16_is_exact(number):
    """Also of a row that has a gradient in the first micro-batch alone, as rare tokens have."""
    tx = ng.galore_adamw(0.1, rank=2)
    params = {"w": jnp.zeros((6, 8), jnp.bfloat16), "embed": jnp.zeros((9, 4), jnp.bfloat16)}
    steps, state = ng.training.low_rank_steps(tx), tx.init(params)
    draw = np.random.default_rng(0).standard_normal
    grads = {k: jnp.asarray(draw((number, *p.shape)), p.dtype) for k, p in params.items()}
    grads["embed"] = grads["embed"].at[1:, 3].set(0)

    def add(carry, g):
        state, mean, position = carry
        low = steps.project(g, steps.refresh(g, state, is_scheduled=position == 0))
        return (*steps.accumulate(g, state, mean, position), position + 1), low

    start = state, steps.empty_mean(params, state), 0
    (_, mean, _), low = jax.lax.scan(add, start, grads)
    for name, found in mean.items():
        expected = np.mean(np.asarray(low[name], np.float64), 0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert found.dtype == jnp.float32
