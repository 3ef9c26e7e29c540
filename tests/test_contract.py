"""Optax's requirements on a transformation, for every public one: see contract.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from contract import FACTORIES, HISTORY, INTERVAL, RANK, random_like, signature, specs, zeros
from jax.sharding import AxisType

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

every_factory = pytest.mark.parametrize("name", FACTORIES)
# Compiled in the fast tier: each kind of projection, state and number format once. The signatures
# of all are tested there by tracing.
COVERING = {
    *("low_rank_project, adam, project_back", "tucker", "online", "all parts"),
    *("natural_galore_adamw", "natural_galore in ng.chain", "quantize_state in a subspace"),
    *("4-bit bases, 8-bit history", "galore_adamw with residual", "apollo_adamw", "ldadamw"),
}
both_dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def assert_close(actual, expected, **tolerance):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), **tolerance
        ),
        actual,
        expected,
    )


def _is_entry(x):
    """Placeholder of one parameter inside a state."""
    return isinstance(x, optax.MaskedNode)


@both_dtypes
@every_factory
def test_init_needs_only_shapes_and_dtypes(name, dtype):
    tx = FACTORIES[name]()
    assert signature(jax.eval_shape(tx.init, specs(dtype))) == signature(tx.init(zeros(dtype)))


@every_factory
def test_init_ignores_the_values_of_parameters(name):
    tx = FACTORIES[name]()
    assert_close(tx.init(random_like(zeros(), 0)), tx.init(zeros()), rtol=0, atol=0)


@every_factory
def test_a_new_state_can_be_donated(name):
    """Also by a step that reads all of it: no buffer is in it twice."""
    leaves = jax.tree.leaves(FACTORIES[name]().init(zeros()))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


@both_dtypes
@every_factory
def test_state_and_updates_keep_structure_shapes_and_dtypes(name, dtype):
    tx = FACTORIES[name]()
    state = jax.eval_shape(tx.init, specs(dtype))
    update = functools.partial(tx.update, value=1.0, unexpected=None)
    updates, new_state = jax.eval_shape(update, specs(dtype), state, specs(dtype))
    assert signature(updates) == signature(specs(dtype))
    assert signature(new_state) == signature(state)


@every_factory
def test_gradients_in_shard_map_that_differ_between_devices(name):
    """The state of the first step is the same on all devices, by its types too, later ones not."""
    tx, mesh = FACTORIES[name](), jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def two_steps(params):
        grads = jax.lax.pcast(params, "data", to="varying")
        _, state = tx.update(grads, tx.init(params), params)
        updates, _ = tx.update(grads, state, params)
        return updates

    run = jax.shard_map(two_steps, mesh=mesh, in_specs=jax.P(), out_specs=jax.P("data"))
    assert jax.tree.structure(jax.eval_shape(run, specs())) == jax.tree.structure(specs())


@every_factory
def test_models_of_their_own_on_each_device(name):
    """The first state has the types of later ones, as a loop inside of shard_map needs."""
    tx, mesh = FACTORIES[name](), jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=2)[0][0]

    run = jax.shard_map(train, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    both = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype), specs()
    )
    assert signature(jax.eval_shape(run, both)) == signature(both)


@every_factory
def test_state_goes_through_a_conditional(name):
    tx = FACTORIES[name]()

    def update_or_not(pred, grads, state, params):
        return jax.lax.cond(pred, lambda: tx.update(grads, state, params), lambda: (grads, state))

    state = jax.eval_shape(tx.init, specs())
    _, new_state = jax.eval_shape(update_or_not, True, specs(), state, specs())
    assert signature(new_state) == signature(state)


@every_factory
def test_map_params_reaches_every_entry_of_a_parameter_and_nothing_else(name):
    tx = FACTORIES[name]()
    state = tx.init(zeros())
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, same, state))

    paths = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), specs())
    mapped = optax.tree.map_params(
        tx,
        lambda _, path: path,
        state,
        paths,
        transform_non_params=lambda x: x.ndim,
        is_leaf=_is_entry,
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(mapped):
        if isinstance(leaf, str):
            assert jax.tree_util.keystr(path).endswith(leaf)
        else:
            assert leaf == 0  # counts and directions
    assert any(isinstance(leaf, str) for leaf in jax.tree.leaves(mapped))


@pytest.mark.parametrize("name", [n for n in FACTORIES if n in COVERING])
def test_one_compilation_and_finite_updates_over_two_refreshes(name):
    tx = FACTORIES[name]()
    params, traces = random_like(zeros(), 0), []

    @jax.jit
    def step(grads, state, params):
        traces.append(None)
        return tx.update(grads, state, params, value=1.0, unexpected=None)

    state = tx.init(params)
    for t in range(6):
        updates, state = step(random_like(params, t + 1), state, params)
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1
    moved = jax.tree.map(lambda u: bool(jnp.isfinite(u).all() and jnp.any(u != 0)), updates)
    assert jax.tree.all(moved), moved


@pytest.mark.parametrize("name", ["low_rank_project, adam, project_back", "all parts"])
def test_jit_and_scan_over_steps_give_what_eager_calls_give(name):
    tx = FACTORIES[name]()
    params = random_like(zeros(), 0)
    grads = [random_like(params, t + 1) for t in range(3)]

    state, eager = tx.init(params), []
    for g in grads:
        u, state = tx.update(g, state, params)
        eager.append(u)

    def step(state, g):
        u, state = tx.update(g, state, params)
        return state, u

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    final, scanned = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(tx.init(params), stacked)
    for t, u in enumerate(eager):
        assert_close(jax.tree.map(lambda x, t=t: x[t], scanned), u, rtol=1e-4, atol=1e-5)
    assert signature(final) == signature(state)


def test_tree_get_finds_the_parts_of_a_state():
    tx = composed_adamw("stored", 0.01, rank=RANK, history=HISTORY)
    state = tx.init(zeros())
    assert optax.tree.get(state, "mu")["dense"]["kernel"].shape == (12, RANK)
    rows, cols = optax.tree.get(state, "basis")
    assert rows["dense"]["kernel"] == optax.MaskedNode()
    assert cols["dense"]["kernel"].shape == (8, RANK)
    assert rows["layers"]["kernel"].shape == (3, 8, RANK)
    history = optax.tree.get(state, "history")
    assert history.columns["dense"]["kernel"].shape == (HISTORY, 12, RANK)
    assert history.columns["dense"]["bias"] == optax.MaskedNode()


def test_masked_leaves_the_rest_untouched():
    inner = ng.galore_adamw(0.01, rank=RANK)
    mask = {"dense": False, "layers": True}
    full_mask = jax.tree.broadcast(mask, zeros())
    tx = optax.masked(inner, full_mask)
    params, grads = random_like(zeros(), 0), random_like(zeros(), 1)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_close(updates["dense"], grads["dense"], rtol=0)
    alone, _ = inner.update(
        {"layers": grads["layers"]},
        inner.init({"layers": params["layers"]}),
        {"layers": params["layers"]},
    )
    assert_close(updates["layers"], alone["layers"], rtol=1e-5, atol=1e-7)


def test_partition_gives_each_group_its_own_rank():
    tx = optax.partition(
        {
            "small": composed_adamw("stored", 0.01, rank=2, history=HISTORY),
            "large": ng.galore_adamw(0.01, rank=4, side="right"),
        },
        {"dense": "small", "layers": "large"},
    )
    params = random_like(zeros(), 0)
    state = tx.init(params)
    assert optax.tree.get(state.inner_states["small"], "mu")["dense"]["kernel"].shape == (12, 2)
    assert optax.tree.get(state.inner_states["large"], "mu")["layers"]["kernel"].shape == (3, 8, 4)
    updates, new_state = jax.jit(tx.update)(random_like(params, 1), state, params)
    assert signature(updates) == signature(params)
    assert signature(new_state) == signature(state)
    assert optax.tree.map_params(tx, lambda x: x, state) is not None


# Transformations in which one matrix may depend on others: a norm of the whole tree, a stack that
# is one matrix.
COUPLED = {"all parts", "tucker", "axes", "8-bit Tucker bases, 4-bit history"}


def run_with(tx, update, bad, step, steps):
    """Updates and states of a run in which one entry of one layer is ``bad`` at one step."""
    params = random_like(zeros(), 0)
    state, runs = tx.init(params), []
    for t in range(steps):
        grads = random_like(params, t + 1)
        if t == step:
            kernel = grads["layers"]["kernel"]
            grads["layers"]["kernel"] = kernel.at[1, 2, 3].set(bad)
        updates, state = update(grads, state, params)
        runs.append((updates, state))
    return runs


def without_the_layer(tree):
    return {**tree, "layers": {**tree["layers"], "kernel": tree["layers"]["kernel"][::2]}}


def _bases(state):
    """Every basis in a state, decoded scales of codes among them."""
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if any(getattr(key, "name", "") == "basis" for key in path)
    ]


@pytest.mark.slow
@every_factory
def test_a_non_finite_gradient_shows_in_the_update_of_its_matrix_alone(name):
    """At a step at which bases are refreshed, and at another one; by one compilation."""
    tx = FACTORIES[name]()
    update = jax.jit(tx.update)
    clean = run_with(tx, update, None, None, INTERVAL + 2)
    for u in jax.tree.leaves(clean[-1][0]):
        assert jnp.isfinite(u).all() and jnp.any(u != 0)
    for step, bad in itertools.product((INTERVAL, 1), (np.nan, np.inf)):
        runs = run_with(tx, update, bad, step, INTERVAL + 2)
        assert not np.all(np.isfinite(runs[step][0]["layers"]["kernel"][1])), step
        assert all(np.all(np.isfinite(x)) for _, state in runs for x in _bases(state))
        for (updates, _), (expected, _) in zip(runs, clean, strict=True):
            if name not in COUPLED:
                assert_close(*map(without_the_layer, (updates, expected)), rtol=0, atol=0)
    assert update._cache_size() == 1


# Optax decides by the gradients alone, in a conditional, which every transformation goes through.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["natural_galore_adamw", "alice_adamw", "8-bit Tucker bases, 4-bit history"]
)
def test_apply_if_finite_goes_on_as_if_the_step_had_not_been(name):
    params = random_like(zeros(), 0)
    tx = optax.apply_if_finite(FACTORIES[name](), max_consecutive_errors=3)
    update, state = jax.jit(tx.update), tx.init(params)
    expected = tx.init(params)
    for t in range(INTERVAL + 2):
        grads = random_like(params, t + 1)
        if t in (0, INTERVAL):
            bad = jax.tree.map(lambda g: g, grads)
            bad["layers"]["kernel"] = bad["layers"]["kernel"].at[1, 2, 3].set(np.nan)
            updates, state = update(bad, state, params)
            assert not any(np.any(u) for u in jax.tree.leaves(updates))
        _, state = update(grads, state, params)
        _, expected = update(grads, expected, params)
    assert int(state.total_notfinite) == 2
    assert_close(state.inner_state, expected.inner_state, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["natural_galore_adamw", "galore_adamw with residual", "ldadamw"])
def test_a_non_finite_gradient_shows_without_a_compiler_too(name, bad):
    tx = FACTORIES[name]()
    updates, _ = run_with(tx, tx.update, bad, 1, 2)[1]
    assert not np.all(np.isfinite(updates["layers"]["kernel"][1]))
