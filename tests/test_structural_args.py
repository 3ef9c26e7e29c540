"""Hyperparameters that live in the state: optax.inject_hyperparams."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng

NUMERIC = {
    *("learning_rate", "eps", "eps_root", "weight_decay"),
    *(
        "damping",
        "scale",
        "unprojected_ratio",
        "vector_ratio",
        "compensation_scale",
        "norm_growth_limit",
        "residual_scale",
        *("limit", "singular_limit"),
    ),
}
FACTORIES = [
    ng.low_rank_project,
    ng.woodbury_natural_gradient,
    ng.project_back,
    ng.natural_galore,
    ng.clip_leading_singular_value,
    ng.scale_by_adam_8bit,
    ng.natural_galore_adamw,
    ng.lean_natural_galore_adamw,
    ng.galore_adamw,
    ng.contrib.scale_by_apollo,
    ng.contrib.apollo_adamw,
    ng.contrib.apollo_mini_adamw,
    ng.contrib.scale_by_ldadam,
    ng.contrib.ldadamw,
    ng.contrib.scale_by_alice,
    ng.contrib.alice_adamw,
    ng.contrib.scale_by_racs,
    ng.contrib.racs_adamw,
    ng.contrib.scale_by_column_norms,
    ng.contrib.scale_sgd,
]
PARAMS = {"w": jnp.ones((6, 8)), "b": jnp.ones(8)}
FIXED = {"rank": 2, "update_interval": 3}


def gradients(t):
    return jax.tree.map(lambda w: jax.random.normal(jax.random.key(t), w.shape), PARAMS)


def injected(factory=ng.natural_galore_adamw, **settings):
    return optax.inject_hyperparams(factory, static_args=ng.structural_args(factory))(**settings)


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_every_argument_is_either_structural_or_a_number(factory):
    names = list(inspect.signature(factory).parameters)
    structural = ng.structural_args(factory)
    assert list(structural) == [name for name in names if name not in NUMERIC]


FIRA = {**FIXED, "residual": "fira"}


@pytest.mark.parametrize(
    ("factory", "learning_rate", "settings"),
    [
        (ng.natural_galore_adamw, 0.1, FIRA),
        (ng.natural_galore_adamw, optax.linear_schedule(0.1, 0.0, 4), FIRA),
        (ng.contrib.apollo_adamw, 0.1, {"rank": 2, "update_interval": 2, "scale": 3.0}),
        (ng.contrib.ldadamw, 0.1, {"rank": 2, "rho": 0.5, "error_feedback": True}),
        (ng.contrib.alice_adamw, 0.1, {"rank": 2, "leading": 1, "compensation_scale": 2.0}),
        (ng.contrib.racs_adamw, 0.1, {"scale": 0.5, "norm_growth_limit": 1.5, "iterations": 2}),
        (ng.contrib.scale_sgd, 0.1, {"norm": "l2", "vector_ratio": 3.0, "head": True}),
    ],
)
def test_injected_equals_plain(factory, learning_rate, settings):
    settings = {"learning_rate": learning_rate, **settings}
    tolerance = {"rtol": 1e-5, "atol": 1e-7}
    if factory is not ng.natural_galore_adamw:
        tolerance = {"rtol": 1e-4, "atol": 1e-6}
    plain, tx = factory(**settings), injected(factory, **settings)
    state, injected_state = plain.init(PARAMS), tx.init(PARAMS)
    plain_update, injected_update = jax.jit(plain.update), jax.jit(tx.update)
    for t in range(4):
        expected, state = plain_update(gradients(t), state, PARAMS)
        actual, injected_state = injected_update(gradients(t), injected_state, PARAMS)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected)


def test_numbers_can_be_changed_in_the_state_without_compiling_again():
    first = {
        "learning_rate": 0.1,
        "scale": 1.0,
        "weight_decay": 0.0,
        "residual_scale": 0.4,
    }
    tx, traces = injected(**first, **FIXED), []

    @jax.jit
    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state, PARAMS)

    _, state = update(gradients(0), tx.init(PARAMS))
    before, _ = update(gradients(1), state)
    for name, value in first.items():
        changed = state._replace(
            hyperparams={**state.hyperparams, name: jnp.float32(3 * value + 1)}
        )
        after, _ = update(gradients(1), changed)
        assert not np.allclose(before["w"], after["w"], rtol=1e-3), name
    assert len(traces) == 1


@pytest.mark.parametrize(
    "factory", [ng.natural_galore_adamw, ng.lean_natural_galore_adamw, ng.contrib.ldadamw]
)
def test_no_cache_keeps_traced_numbers(factory):
    tx = injected(factory, learning_rate=0.1, rank=2)
    state = jax.eval_shape(tx.init, PARAMS)
    with jax.checking_leaks():
        jax.eval_shape(tx.update, PARAMS, state, PARAMS)


def test_damping_schedule_is_evaluated_in_the_state():
    tx = injected(ng.natural_galore, **FIXED, damping=lambda count: 0.5 / (1 + count))
    state = tx.init(PARAMS)
    for t in range(3):
        _, state = tx.update(gradients(t), state, PARAMS)
    np.testing.assert_allclose(state.hyperparams["damping"], 0.5 / 3, rtol=1e-6)


def test_parts_can_be_injected_under_jit():
    tx = injected(ng.natural_galore, rank=2, history=2, scale=0.5)
    state = tx.init(PARAMS)
    half, _ = jax.jit(tx.update)(gradients(0), state, PARAMS)
    state.hyperparams["scale"] = jnp.float32(1.0)
    whole, _ = jax.jit(tx.update)(gradients(0), state, PARAMS)
    np.testing.assert_allclose(2 * half["w"], whole["w"], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "factory", "given"),
    [
        *(
            (name, ng.natural_galore_adamw, {"learning_rate": 0.1, "rank": 2, "moment_bits": 8})
            for name in ("rank", "update_interval", "seed", "where", "moment_bits")
        ),
        ("b3", ng.contrib.alice_adamw, {"learning_rate": 0.1, "rank": 2}),
        ("exponent", ng.compact_natural_gradient, {}),
    ],
)
def test_injecting_a_structural_argument_names_the_remedy(name, factory, given):
    static = [arg for arg in ng.structural_args(factory) if arg != name]
    tx = optax.inject_hyperparams(factory, static_args=static)(**given)
    with pytest.raises(TypeError, match=r"natgalore_jax\.structural_args"):
        jax.eval_shape(tx.init, PARAMS)


@pytest.mark.parametrize(
    "factory", [ng.natural_galore_adamw, ng.contrib.apollo_adamw, ng.contrib.ldadamw]
)
def test_bfloat16_parameters_do_not_round_decays_to_one(factory):
    """Injected they would have the dtype of the parameters, in which 0.999 is 1."""
    params = optax.tree.cast(PARAMS, jnp.bfloat16)
    tx = injected(factory, learning_rate=0.1, rank=2, b2=0.999)
    state = tx.init(params)
    assert not {"b1", "b2", "rho", "residual_decay"} & set(state.hyperparams)
    grads = optax.tree.cast(gradients(0), jnp.bfloat16)
    _, state = jax.jit(tx.update)(grads, state, params)
    assert bool((optax.tree.get(state, "nu")["b"] > 0).all())


def test_injecting_everything_names_the_remedy():
    with pytest.raises(TypeError, match=r"natgalore_jax\.structural_args"):
        optax.inject_hyperparams(ng.galore_adamw)(0.1, rank=2).init(PARAMS)
