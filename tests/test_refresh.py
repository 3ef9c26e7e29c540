"""Schedule of refreshes; nothing else is computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw

import natgalore_jax as ng
from benchmarks.optimizer.compile_time import equations
from natgalore_jax._src.refresh.schedule import due_matrices

pytestmark = pytest.mark.usefixtures("fast_compile")


def due_at(total, interval, accumulation, stagger, step):
    return range(*map(int, due_matrices(total, interval, accumulation, stagger=stagger, step=step)))


@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize(
    "total,interval,accumulation", [(1, 5, 1), (8, 20, 1), (8, 4, 1), (4, 1, 1), (8, 12, 3)]
)
def test_every_matrix_once_per_interval_and_all_at_first(total, interval, accumulation, stagger):
    assert due_at(total, interval, accumulation, stagger, 0) == range(total)
    for start in (interval, 3 * interval):
        due = {
            t: due_at(total, interval, accumulation, stagger, t)
            for t in range(start, start + interval)
        }
        assert sorted(q for matrices in due.values() for q in matrices) == list(range(total))
        assert all(t % accumulation == 0 for t, matrices in due.items() if matrices)


@pytest.mark.parametrize(
    "total,interval,accumulation",
    [(1, 5, 1), (24, 10, 1), (24, 24, 1), (224, 200, 1), (224, 223, 1), (10, 60, 4), (40, 12, 3)],
)
def test_every_matrix_is_due_when_a_table_says(total, interval, accumulation):
    """Matrix q of N is due in slot ⌊q T / N⌋."""
    slots = interval // accumulation
    slot_of_matrix = np.arange(total) * slots // total
    steps = np.arange(interval, 3 * interval)
    begin, end = jax.jit(
        jax.vmap(lambda t: due_matrices(total, interval, accumulation, stagger=True, step=t))
    )(steps.astype(np.int32))
    for step, *limits in zip(steps, begin, end, strict=True):
        due = np.flatnonzero(slot_of_matrix == step // accumulation % slots)
        assert list(range(*map(int, limits))) == ([] if step % accumulation else list(due))


@pytest.mark.parametrize("interval", [10**7, 2**30 + 1, 2**31 - 1])
@pytest.mark.parametrize("total", [1, 8, 224])
def test_the_longest_intervals_take_no_table_of_slots_and_no_product_that_overflows(
    total, interval
):
    """Python's integers decide which slots have a matrix."""
    at = jax.jit(lambda t: due_matrices(total, interval, 1, stagger=True, step=t))
    for number in {0, total // 2, total - 1}:
        slot = number * interval // total
        for step in {max(slot - 1, 0), slot, slot + 1}:
            begin, end = at(jnp.int32(step))
            assert bool(begin <= number < end) == (step in (0, slot))
    text = jax.jit(at).lower(jax.ShapeDtypeStruct((), jnp.int32)).as_text()
    assert len(text) < 100_000


def test_an_interval_that_no_step_count_reaches_is_refused():
    for factory in (ng.low_rank_project, ng.contrib.scale_by_apollo):
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
def test_a_refresh_stands_in_a_loop_over_what_is_due(stagger):
    """No power step in the entry computation, where it would run at every step."""
    shapes = jax.eval_shape(stacked_params)
    tx = chain(update_interval=10, stagger=stagger, where=lambda p, x: True)
    text = compiled_update(tx, shapes).as_text()
    entry = text[text.index("ENTRY") :]
    assert " while(" in text
    assert " while(" not in entry
    assert len(re.findall(r"conditional\(", entry)) >= 3


DEFAULTS = {
    "natural_galore_adamw": lambda: ng.natural_galore_adamw(1e-3, rank=4),
    "both sides": lambda: ng.natural_galore_adamw(1e-3, rank=4, side="both"),
    "eight bits": lambda: ng.natural_galore_adamw(1e-3, rank=4, moment_bits=8, basis_dtype="int8"),
    "online": lambda: composed_adamw(
        "compact", 1e-3, rank=4, method="online", update_interval=1, residual="fisher"
    ),
    "galore_adamw": lambda: ng.galore_adamw(1e-3, rank=4),
    "fira": lambda: ng.galore_adamw(1e-3, rank=4, residual="fira"),
    "apollo_adamw": lambda: ng.contrib.apollo_adamw(1e-3, rank=4),
    "ldadamw": lambda: ng.contrib.ldadamw(1e-3, rank=4),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_no_default_optimizer_calls_a_solver(name):
    """Products of matrices alone: no LAPACK on CPUs, no solver on accelerators."""
    params = {"w": jnp.zeros((3, 16, 24)), "v": jnp.zeros((16, 24)), "b": jnp.zeros(24)}
    tx = DEFAULTS[name]()
    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(tx.update).lower(params, state, params)
    text = lowered.as_text() + lowered.compile().as_text()
    calls = re.findall(r'custom_call(?:_target=| @)"?(\w+)', text)
    assert not [c for c in calls if re.search("lapack|blas|solver|Qr|Cholesky|Svd|Eigh", c, re.I)]
    assert not re.search("cholesky|triangular.solve|householder", text)


def test_the_program_of_many_equal_matrices_grows_by_little_for_each():
    """Matrices of one kind differ by a copy in and a copy out."""

    def of(number):
        params = {f"{i}": jnp.zeros((16, 24)) for i in range(number)}
        tx = ng.chain(ng.low_rank_project(rank=4), optax.scale_by_adam(), ng.project_back())
        jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params))
        return equations(jaxpr.jaxpr)

    few, many = of(2), of(22)
    assert (many - few) / 20 < 60 < few / 2


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
