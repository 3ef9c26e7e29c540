"""A matrix has its first refresh at its first gradient that is finite and not zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

PARAMS = {"a": jnp.zeros((12, 20)), "stack": jnp.zeros((3, 12, 20)), "wide": jnp.zeros((2, 20, 12))}
# The step of the first gradient of each matrix.
BEGINS = {"a": [2], "stack": [0, 3, 1], "wide": [5, 0]}
INTERVAL = 100


def gradients(step, empty=0.0):
    """Gradients of rank 3, or ``empty``."""
    rng = np.random.default_rng(step)
    grads = {}
    for name, begins in BEGINS.items():
        m, n = PARAMS[name].shape[-2:]
        G = rng.standard_normal((len(begins), m, 3)) @ rng.standard_normal((len(begins), 3, n))
        G[np.asarray(begins) > step] = empty
        grads[name] = jnp.asarray(G.reshape(PARAMS[name].shape), jnp.float32)
    return grads


def kept(G, low):
    """The share of each matrix's energy that is in its low-rank form."""
    low, G = (np.asarray(x, np.float64).reshape(-1, *x.shape[-2:]) for x in (low, G))
    energy = np.sum(G**2, (1, 2))
    return np.sum(low**2, (1, 2)) / np.where(energy > 0, energy, np.inf)


def transformation(**settings):
    return ng.chain(
        ng.low_rank_project(
            **{"rank": 3, "update_interval": INTERVAL, "where": lambda p, x: True, **settings}
        ),
        optax.trace(0.9),
        ng.project_back(),
    )


def assert_started_at_the_first_gradient(tx, update, projected, empty=0.0, exact=0.99):
    state = tx.init(PARAMS)
    for step in range(7):
        G, before = gradients(step, empty), state
        _, state = update(G, state)
        low = projected(G, state)
        for name, begins in BEGINS.items():
            begins = np.asarray(begins)
            # Later gradients have other subspaces, and are not looked at for an interval.
            assert np.all(kept(G[name], low[name])[begins == step] > exact)
            for old, new in zip(
                *(jax.tree.leaves(s[0].basis) for s in (before, state)), strict=True
            ):
                assert old.shape == new.shape
        moved = jax.tree.map(
            lambda old, new: np.any(np.asarray(old != new), (-2, -1)),
            *({k: _factor(s, k) for k in BEGINS} for s in (before, state)),
        )
        for name, begins in BEGINS.items():
            np.testing.assert_array_equal(np.ravel(moved[name]), np.asarray(begins) == step)


def _factor(state, name):
    (factor,) = (t[name] for t in state[0].basis if not isinstance(t[name], optax.MaskedNode))
    return factor


@pytest.mark.parametrize("empty", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("method,stagger", [("power", True), ("power", False), ("svd", True)])
def test_each_matrix_of_a_stack_starts_at_its_own_first_gradient(method, stagger, empty):
    tx = transformation(method=method, stagger=stagger)
    steps = ng.training.low_rank_steps(tx)
    assert_started_at_the_first_gradient(tx, jax.jit(tx.update), steps.project, empty)


@pytest.mark.parametrize("side,transition", [("both", "rotate"), ("long", "reset")])
def test_other_sides(side, transition):
    tx = transformation(side=side, transition=transition)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in range(7):
        _, state = update(gradients(step), state)
        low = ng.training.low_rank_steps(tx).project(gradients(step), state)
        for name, begins in BEGINS.items():
            now = np.asarray(begins) == step
            assert np.all(kept(gradients(step)[name], low[name])[now] > 0.99)


def test_tucker_starts_at_its_first_gradient():
    tx = ng.chain(ng.low_rank_project(rank=(2, 3, 2), update_interval=INTERVAL), optax.trace(0.9))
    steps, params = ng.training.low_rank_steps(tx), {"w": jnp.zeros((6, 8, 7))}
    _, state = tx.update(params, tx.init(params))
    first = state[0].basis
    for start, kept_start in zip(tx.init(params)[0].basis, first, strict=True):
        np.testing.assert_array_equal(start["w"], kept_start["w"])
    rng = np.random.default_rng(0)
    G = np.einsum(
        "abc,ia,jb,kc->ijk", *(rng.standard_normal(s) for s in [(2, 3, 2), (6, 2), (8, 3), (7, 2)])
    )
    G = {"w": jnp.asarray(G, jnp.float32)}
    _, state = tx.update(G, state)
    low = steps.project(G, state)["w"]
    assert float(jnp.sum(low**2)) > 0.99 * float(jnp.sum(G["w"] ** 2))


def test_first_gradients_in_any_micro_batch():
    """An expert whose first token comes in the second micro-batch of a step."""
    tx = transformation()
    steps = ng.training.low_rank_steps(tx)
    accumulate = jax.jit(steps.accumulate)
    state = tx.init(PARAMS)
    mean = optax.tree.zeros_like(steps.project(PARAMS, state))
    for step in range(6):  # of one accumulation
        before, (state, mean) = state, accumulate(gradients(step), state, mean, step)
        low = steps.project(gradients(step), state)
        for name, begins in BEGINS.items():
            begins = np.asarray(begins)
            assert np.all(kept(gradients(step)[name], low[name])[begins == step] > 0.99)
            moved = np.any(np.asarray(_factor(before, name) != _factor(state, name)), (-2, -1))
            np.testing.assert_array_equal(np.ravel(moved), begins == step)


def test_first_gradients_inside_multi_steps():
    tx = ng.chain(
        ng.low_rank_project(rank=3, update_interval=4, where=lambda p, x: True),
        optax.MultiSteps(optax.sgd(1.0), 4),
    )
    state, update, total = tx.init(PARAMS), jax.jit(tx.update), optax.tree.zeros_like(PARAMS)
    for step in range(4):
        total = optax.tree.add(total, gradients(step))
        updates, state = update(gradients(step), state)
    # What came first is in the subspace: the first gradient of stack[1] is that of the last step.
    np.testing.assert_allclose(updates["stack"][1], -total["stack"][1] / 4, atol=1e-4)


def test_first_gradients_in_per_layer():
    width, depth = 8, 3
    begins = np.array([0, 2, 1])

    def layer(W, x):
        return x + W["gate"] * (x @ W["w"])

    tx = ng.chain(ng.low_rank_project(rank=2, update_interval=INTERVAL), optax.sgd(0.0))
    per_layer = ng.training.per_layer(
        tx,
        lambda params, batch: batch,
        layer,
        lambda params, x, batch: jnp.sum(jnp.sin(x) * params["out"]),
    )

    def params_at(step):
        W = jax.random.normal(jax.random.key(0), (depth, width, width)) / 4
        gate = jnp.asarray(begins <= step, jnp.float32)
        return {"layers": {"w": W, "gate": gate}, "out": jnp.ones(width)}

    state = per_layer.init(params_at(0))
    for step in range(4):
        batch = jax.random.normal(jax.random.key(step), (5, width))
        before = np.asarray(state.opt_state[0].basis[0]["layers"]["w"])
        _, state, _ = per_layer.step(params_at(step), state, batch)
        after = np.asarray(state.opt_state[0].basis[0]["layers"]["w"])
        np.testing.assert_array_equal(np.any(before != after, (1, 2)), begins == step)


def test_first_gradients_of_single_devices():
    """Low-rank exchange: only one device has tokens for an expert."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    tx = ng.chain(ng.low_rank_project(rank=2, update_interval=INTERVAL), optax.sgd(0.1))
    params = {"w": jnp.zeros((2, 8, 10))}

    def loss(params, batch):
        x, expert = batch
        y = jnp.einsum("bi,bij->bj", x, params["w"][expert])
        return jnp.mean(jnp.sum(jnp.sin(y + 0.3), -1))

    step = ng.training.data_parallel_step(loss, tx, mesh)
    state = tx.init(params)
    seen = []
    for experts in ([0, 0], [0, 0], [0, 1], [1, 1]):
        x = jax.random.normal(jax.random.key(len(seen)), (2, 8))
        before = np.asarray(state[0].basis[0]["w"])
        params, state, _ = step(params, state, (x, jnp.asarray(experts)))
        seen.append(np.any(before != state[0].basis[0]["w"], (1, 2)).tolist())
    assert seen == [[True, False], [False, False], [False, True], [False, False]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape,axis", [((16, 24), 0), ((600, 20), 0), ((3, 7, 500), 1)])
def test_a_start_is_known_in_every_format_and_no_basis_is_taken_for_one(dtype, shape, axis):
    """Until the first gradient the start stays; after it a refresh waits for the interval."""
    side = "left" if axis == 0 else "short"
    tx = ng.chain(
        ng.low_rank_project(
            rank=5, side=side, update_interval=INTERVAL, basis_dtype=dtype, where=lambda p, x: True
        )
    )
    update, params = jax.jit(tx.update), {"w": jnp.zeros(shape)}
    rng = np.random.default_rng(0)
    states = [tx.init(params)]
    for step in range(4):
        # A constant gradient has a constant first vector.
        G = [np.zeros(shape), np.ones(shape), rng.standard_normal(shape), np.ones(shape)][step]
        states.append(update({"w": jnp.asarray(G, jnp.float32)}, states[-1])[1])
    moved = [
        any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in zip(*([s[0].basis for s in x] for x in (states, states[1:])), strict=False)
    ]
    assert moved == [False, True, False, False]


@pytest.mark.parametrize("method", ["power", "svd"])
def test_tucker_of_a_mode_of_length_one_starts_at_its_first_gradient(method):
    tx = ng.chain(
        ng.low_rank_project(
            rank=(1, 2, 2), update_interval=INTERVAL, method=method, where=lambda p, x: True
        ),
    )
    steps, params = ng.training.low_rank_steps(tx), {"conv": jnp.zeros((1, 6, 8))}
    _, state = tx.update(params, tx.init(params))
    rng = np.random.default_rng(0)
    G = {"conv": jnp.asarray(rng.standard_normal((6, 2)) @ rng.standard_normal((2, 8)))[None]}
    _, state = tx.update(G, state)
    low = steps.project(G, state)["conv"]
    assert float(jnp.sum(low**2)) > 0.99 * float(jnp.sum(G["conv"] ** 2))


@pytest.mark.parametrize("method", ["power", "svd"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_basis_that_equals_the_start_by_chance_has_started(method, sign):
    """Gradients of two classes are opposite, as the two rows of the start."""
    settings = {
        "rank": 1,
        "update_interval": INTERVAL,
        "stagger": False,
        "where": lambda p, x: True,
    }
    tx = ng.chain(ng.low_rank_project(method=method, **settings))
    state = tx.init({"head": jnp.zeros((2, 5))})
    for rows in ([-1.0, 1.0], [1.0, 0.0]):
        before = state
        _, state = tx.update({"head": sign * jnp.outer(jnp.array(rows), jnp.arange(1.0, 6))}, state)
    np.testing.assert_array_equal(_factor(before, "head"), _factor(state, "head"))
