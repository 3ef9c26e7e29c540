"""Numbers and dtypes do not follow the configuration that a program gives JAX."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import FACTORIES, RANK, random_like, signature, specs, zeros

import natgalore_jax as ng

# Optax's Adam raises under strict promotion, its SGD and Lion do not.
OWN = {
    "projection": lambda: ng.chain(
        ng.low_rank_project(rank=RANK), ng.project_back(residual="fira")
    ),
    "both sides, in codes": lambda: ng.natural_galore(
        rank=RANK, history=2, side="both", basis_dtype="int4", history_dtype="int8"
    ),
    "compact": lambda: ng.chain(
        ng.low_rank_project(rank=RANK, method="randomized"),
        ng.compact_natural_gradient(optax.scale_by_lion(), structure="full", cautious=True),
        ng.project_back(residual="fisher"),
    ),
    "8 bits": lambda: ng.scale_by_adam_8bit(min_size=16, nesterov=True),
    "quantized": lambda: ng.quantize_state(optax.scale_by_lion(), min_size=16),
    "published Adam": lambda: ng.published_galore_adamw(0.01, rank=RANK),
    "apollo": lambda: ng.contrib.scale_by_apollo(rank=RANK),
    "ldadam": lambda: ng.contrib.scale_by_ldadam(rank=RANK, error_feedback=True),
    "alice": lambda: ng.contrib.scale_by_alice(rank=RANK, leading=1),
    "racs": lambda: ng.contrib.scale_by_racs(),
    "scale": lambda: ng.contrib.scale_by_column_norms(head=lambda path, leaf: "dense" in path),
}
PRECISIONS = ["bfloat16", "BF16_BF16_F32"]  # one of the precisions, one of the algorithms


@contextlib.contextmanager
def configured(**settings):
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def program(tx, dtype=jnp.float32):
    """The update as text, without the addresses of Python's objects."""
    state = jax.eval_shape(tx.init, specs(dtype))
    text = str(jax.make_jaxpr(tx.update)(specs(dtype), state, specs(dtype)))
    return re.sub("0x[0-9a-f]+", "", text)


def check_signatures(tx, dtype):
    state = jax.eval_shape(tx.init, specs(dtype))
    updates, new_state = jax.eval_shape(tx.update, specs(dtype), state, specs(dtype))
    assert signature(updates) == signature(specs(dtype))
    assert signature(new_state) == signature(state)
    return signature(state)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.float64, jnp.bfloat16], ids=lambda d: d.__name__
)
def test_x64_leaves_dtypes_as_they_are(dtype):
    """Also those of the states: nothing becomes 64 bits wide that was not."""
    for name, factory in FACTORIES.items():
        with configured(jax_enable_x64=True):
            wide = check_signatures(factory(), dtype)
        if dtype != jnp.float64:
            assert signature(jax.eval_shape(factory().init, specs(dtype))) == wide, name


WIDE = np.float64(0.5)  # of a sweep, or injected for float64 parameters
OF_WIDE_NUMBERS = {
    "apollo": lambda: ng.contrib.scale_by_apollo(RANK, scale=WIDE, norm_growth_limit=1 + WIDE),
    "ldadam": lambda: ng.contrib.scale_by_ldadam(RANK, b1=WIDE, b2=WIDE, rho=WIDE),
    "alice": lambda: ng.contrib.scale_by_alice(
        RANK, b1=WIDE, b2=WIDE, b3=WIDE, scale=WIDE, norm_growth_limit=1 + WIDE
    ),
    "racs": lambda: ng.contrib.scale_by_racs(WIDE, scale=WIDE, norm_growth_limit=1 + WIDE),
    "scale": lambda: ng.contrib.scale_by_column_norms(momentum=WIDE, eps=WIDE, head=True),
    "8 bits": lambda: ng.scale_by_adam_8bit(WIDE, WIDE, WIDE, nesterov=True, min_size=16),
    "fira": lambda: ng.natural_galore(
        RANK, residual="fira", residual_scale=WIDE, norm_growth_limit=1 + WIDE
    ),
}


@pytest.mark.parametrize("name", OF_WIDE_NUMBERS)
def test_states_do_not_become_as_wide_as_numbers_among_the_arguments(name):
    with configured(jax_enable_x64=True):
        tx, params = OF_WIDE_NUMBERS[name](), specs()
        state = jax.eval_shape(tx.init, params)
        _, new_state = jax.eval_shape(tx.update, params, state, params)
        assert signature(new_state) == signature(state)


def test_ranks_may_not_be_promoted_outside():
    with configured(jax_numpy_rank_promotion="raise"):
        for factory in FACTORIES.values():
            check_signatures(factory(), jnp.float32)


@pytest.mark.parametrize("name", OWN)
def test_dtypes_may_not_be_promoted_outside(name):
    with configured(jax_numpy_dtype_promotion="strict", jax_numpy_rank_promotion="raise"):
        for dtype in (jnp.float32, jnp.bfloat16):
            check_signatures(OWN[name](), dtype)


MIXED = {
    "scale_by_adam_8bit": lambda: ng.scale_by_adam_8bit(min_size=4),
    "quantize_state": lambda: ng.quantize_state(optax.trace(0.9), min_size=4),
    "projection": lambda: ng.chain(ng.low_rank_project(rank=RANK), ng.project_back()),
    "ldadam": lambda: ng.contrib.scale_by_ldadam(rank=RANK),
    "apollo": lambda: ng.contrib.scale_by_apollo(rank=RANK),
    "racs": lambda: ng.contrib.scale_by_racs(),
    "column norms": lambda: ng.contrib.scale_by_column_norms(),
    "alice": lambda: ng.contrib.scale_by_alice(rank=RANK),
}


@pytest.mark.parametrize("name", MIXED)
def test_wide_gradients_of_narrow_parameters_under_strict_promotion(name):
    tx, params, grads = MIXED[name](), specs(jnp.bfloat16), specs(jnp.float32)
    expected = jax.eval_shape(lambda g, w: tx.update(g, tx.init(w), w)[0], grads, params)
    with configured(jax_numpy_dtype_promotion="strict", jax_numpy_rank_promotion="raise"):
        actual = jax.eval_shape(lambda g, w: tx.update(g, tx.init(w), w)[0], grads, params)
    assert signature(actual) == signature(expected)


def test_products_state_their_precision():
    """The program is the same one, so that its numbers are."""
    for name, factory in {**OWN, "default": lambda: ng.natural_galore_adamw(0.01, rank=2)}.items():
        expected = program(factory())
        assert "precision=None" not in expected, name
        for precision in PRECISIONS:
            with configured(jax_default_matmul_precision=precision):
                assert program(factory()) == expected, name


@pytest.mark.parametrize("method", ["gaussian", "randomized"])
@pytest.mark.parametrize(
    "settings",
    [{"jax_threefry_partitionable": False}, {"jax_default_prng_impl": "rbg"}],
    ids=lambda s: next(iter(s)),
)
def test_random_numbers_are_the_same(method, settings, fast_compile):
    tx = ng.chain(ng.low_rank_project(rank=RANK, method=method), ng.project_back())
    grads = random_like(zeros(), 1)

    def bases():
        _, state = jax.jit(tx.update)(grads, tx.init(zeros()))
        return jax.tree.leaves(state[0].basis)

    expected = bases()
    with configured(**settings):
        for actual, wanted in zip(bases(), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


def covering():
    return ng.chain(
        ng.low_rank_project(rank=RANK, update_interval=1),
        ng.woodbury_natural_gradient(history=2, damping=0.1),
        ng.compact_natural_gradient(optax.scale_by_adam(), cautious=True),
        ng.project_back(0.5, residual="fisher"),
        optax.add_decayed_weights(0.01),
    )


def two_steps(tx, dtype=jnp.float32, jit=jax.jit):
    params = {"w": jnp.ones((8, 6), dtype), "b": jnp.ones(6, dtype)}
    rng, state, update = np.random.default_rng(0), tx.init(params), jit(tx.update)
    for _ in range(2):
        grads = jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape), dtype), params)
        updates, state = update(grads, state, params)
    return [np.asarray(u, np.float64) for u in jax.tree.leaves(updates)]


@functools.cache
def two_steps_of_covering():
    return two_steps(covering())


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (jnp.float32, {"jax_enable_x64": True}),
        (jnp.float64, {"jax_enable_x64": True}),
        (jnp.float32, {"jax_disable_jit": True}),
        (jnp.float32, {"jax_debug_nans": True}),
        (
            jnp.float32,
            {"jax_numpy_rank_promotion": "raise", "jax_default_matmul_precision": "BF16_BF16_F32"},
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x.__name__,
)
def test_numbers_are_the_same(dtype, settings, fast_compile):
    expected = two_steps_of_covering()
    with configured(**settings):
        actual = two_steps(covering(), dtype)
    # Updates are of size one; sums in another order, through power steps and a Cholesky solve.
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "factory", [ng.contrib.scale_by_ldadam, ng.contrib.scale_by_apollo, ng.contrib.scale_by_alice]
)
def test_random_numbers_of_other_methods_are_the_same(factory, fast_compile):
    grads = random_like(zeros(), 1)

    def update():
        tx = factory(rank=RANK)
        return tx.update(grads, tx.init(grads), grads)[0]

    expected = update()
    with configured(jax_threefry_partitionable=False, jax_default_prng_impl="rbg"):
        jax.tree.map(np.testing.assert_array_equal, update(), expected)
