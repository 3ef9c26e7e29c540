"""What is refreshed when, and that nothing else is computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng
from natgalore_jax._schedule import due_layers


def due_at(layers, interval, accumulation, stagger, step):
    ranges = due_layers(layers, interval, accumulation, stagger=stagger, step=jnp.asarray(step))
    return [(i, layer) for i, (a, b) in enumerate(ranges) for layer in range(int(a), int(b))]


@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize(
    "layers,interval,accumulation",
    [([1], 5, 1), ([3, 1, 4], 20, 1), ([3, 1, 4], 4, 1), ([2, 2], 1, 1), ([3, 5], 12, 3)],
)
def test_every_matrix_once_per_interval_and_all_at_first(layers, interval, accumulation, stagger):
    everything = [(i, l) for i, count in enumerate(layers) for l in range(count)]
    assert due_at(layers, interval, accumulation, stagger, 0) == everything
    for start in (interval, 3 * interval):
        due = {
            t: due_at(layers, interval, accumulation, stagger, t)
            for t in range(start, start + interval)
        }
        assert sorted(matrix for matrices in due.values() for matrix in matrices) == everything
        assert all(t % accumulation == 0 for t, matrices in due.items() if matrices)


def bounds_in_a_table(layers, slots):
    """Matrix q of N is due in slot ⌊q T / N⌋: for each leaf the first layer of each slot."""
    total, offset, bounds = sum(layers), 0, []
    for count in layers:
        slot_of_layer = (offset + np.arange(count)) * slots // total
        bounds.append(np.searchsorted(slot_of_layer, np.arange(slots + 1), side="left"))
        offset += count
    return bounds


@pytest.mark.parametrize(
    "layers,interval,accumulation",
    [
        ([1], 5, 1),
        ([7, 1, 13, 3], 10, 1),
        ([7, 1, 13, 3], 24, 1),
        ([32] * 7, 200, 1),
        ([32] * 7, 223, 1),
        ([3, 5, 0, 2], 60, 4),
        ([1] * 40, 12, 3),
    ],
)
def test_every_matrix_is_due_when_a_table_says(layers, interval, accumulation):
    table, slots = bounds_in_a_table(layers, interval // accumulation), interval // accumulation
    assert max(sum(np.diff(b) for b in table)) <= -(-sum(layers) // slots)  # evenly
    steps = np.arange(interval, 3 * interval)
    ranges = jax.jit(
        jax.vmap(lambda t: due_layers(layers, interval, accumulation, stagger=True, step=t))
    )(steps.astype(np.int32))
    for (first, end), bounds in zip(ranges, table, strict=True):
        slot = steps // accumulation % slots
        due = steps % accumulation == 0
        np.testing.assert_array_equal(np.where(due, first, 0), np.where(due, bounds[slot], 0))
        np.testing.assert_array_equal(end - first, np.where(due, np.diff(bounds)[slot], 0))


@pytest.mark.parametrize("interval", [10**7, 2**30 + 1, 2**31 - 1])
@pytest.mark.parametrize("layers", [[1], [3, 1, 4], [90, 133, 1]])
def test_the_longest_intervals_take_no_table_and_no_product_that_overflows(layers, interval):
    """Python's integers decide which slots have a matrix."""
    total, offset = sum(layers), 0
    at = jax.jit(lambda t: due_layers(layers, interval, 1, stagger=True, step=t))
    for leaf, count in enumerate(layers):
        for layer in {0, count // 2, count - 1}:
            slot = (offset + layer) * interval // total
            for step in {max(slot - 1, 0), slot, slot + 1}:
                first, end = at(jnp.int32(step))[leaf]
                assert bool(first <= layer < end) == (step in (0, slot))
        offset += count
    text = jax.jit(at).lower(jax.ShapeDtypeStruct((), jnp.int32)).as_text()
    assert len(text) < 100_000


def test_an_interval_that_no_step_count_reaches_is_refused():
    for factory in (ng.low_rank_project, ng.scale_by_apollo):
        with pytest.raises(ValueError, match="update_interval must be at most 2147483647, got"):
            factory(update_interval=2**31)


def chain(**settings):
    return ng.chain(ng.low_rank_project(rank=4, **settings), optax.scale_by_adam())


def stacked_params():
    return {"a": jnp.ones((3, 16, 24)), "b": jnp.ones((20, 12)), "c": jnp.ones((2, 2, 8, 8))}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), stacked_params()
    )


@pytest.mark.parametrize("transition", ["rotate", "keep"])
def test_only_what_is_due_changes(transition):
    tx = chain(update_interval=16, transition=transition, where=lambda p, x: True)
    update = jax.jit(tx.update)
    state = tx.init(stacked_params())
    _, state = update(gradients(0), state)
    changes = np.zeros(8, int)
    for step in range(1, 17):
        before, (_, state) = state, update(gradients(step), state)
        for (_, old), (_, new) in zip(
            *(jax.tree_util.tree_leaves_with_path(s[0].basis) for s in (before, state)), strict=True
        ):
            old, new = (np.asarray(x).reshape(-1, *x.shape[-2:]) for x in (old, new))
            offset = {3: 0, 1: 3, 4: 4}[len(old)]
            changes[offset : offset + len(old)] += np.any(old != new, axis=(1, 2))
    np.testing.assert_array_equal(changes, np.ones(8, int))


def compiled_update(tx, params):
    state = jax.eval_shape(tx.init, params)
    return jax.jit(tx.update, donate_argnums=1).lower(params, state).compile()


@pytest.mark.parametrize("stagger", [True, False])
def test_factorisation_stands_in_a_loop_over_what_is_due(stagger):
    """No QR in the entry computation, where it would run at every step, and no select over one."""
    shapes = jax.eval_shape(stacked_params)
    tx = chain(update_interval=10, stagger=stagger, where=lambda p, x: True)
    text = compiled_update(tx, shapes).as_text()
    entry = text[text.index("ENTRY") :]
    assert "geqrf" in text
    assert "geqrf" not in entry
    assert len(re.findall(r"conditional\(", entry)) >= 3


def test_refresh_needs_no_more_memory_than_one_layer():
    shape = (12, 96, 128)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def temporary(**settings):
        tx = ng.chain(ng.low_rank_project(rank=32, **settings), optax.trace(0.9))
        return compiled_update(tx, params).memory_analysis().temp_size_in_bytes

    one_layer = 4 * shape[1] * shape[2]
    with_refresh = temporary(update_interval=10, transition="keep")
    without = temporary(update_interval=10, transition="keep", method="gaussian")
    # gaussian does not look at the gradient, so its loop holds a few (m, r) matrices only.
    assert with_refresh <= without + 4 * one_layer
    assert with_refresh <= 4 * np.prod(shape) + 6 * one_layer


@pytest.mark.parametrize("method", ["power", "online"])
def test_interval_of_one_and_online_move_at_every_step(method):
    tx = chain(update_interval=1, method=method, where=lambda p, x: True)
    update, state = jax.jit(tx.update), tx.init(stacked_params())
    for step in range(3):
        before, (_, state) = state, update(gradients(step), state)
        for old, new in zip(
            jax.tree.leaves(before[0].basis), jax.tree.leaves(state[0].basis), strict=True
        ):
            old, new = (np.asarray(x).reshape(-1, *x.shape[-2:]) for x in (old, new))
            assert np.all(np.any(old != new, axis=(1, 2)))
