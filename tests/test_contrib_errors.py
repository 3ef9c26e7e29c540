"""Methods of other publications: errors, and what holds for all of them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import natgalore_jax as ng

WRONG_ARGUMENTS = {
    "alice_adamw": [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"update_interval": 0}, ValueError, "update_interval must be at least 1, got 0"),
        ({"leading": -1}, ValueError, "leading must be at least 0, got -1"),
        ({"leading": 129}, ValueError, "leading must be at most rank=128, got 129"),
        (
            {"compensation_scale": 0.0, "norm_growth_limit": 1.1},
            ValueError,
            "norm_growth_limit has no effect without a compensation",
        ),
        ({"b3": 1.0}, ValueError, "b3 must be at least 0 and less than 1"),
        ({"compensation_scale": "much"}, TypeError, "compensation_scale must be a number"),
        ({"norm_growth_limit": 1.0}, ValueError, "norm_growth_limit must be greater than 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"b3": jnp.float32(0.9)}, TypeError, "b3 must be a Python number.*structural_args"),
    ],
    "apollo_adamw": [
        ({"rank": (2, 2, 2)}, TypeError, "rank must be an integer"),
        ({"update_interval": 0}, ValueError, "update_interval must be at least 1, got 0"),
        ({"granularity": "row"}, ValueError, "granularity must be one of channel, tensor"),
        ({"scale": "big"}, TypeError, "scale must be a number"),
        ({"norm_growth_limit": 1.0}, ValueError, "norm_growth_limit must be greater than 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": 2**32}, ValueError, "seed must be at most 4294967295"),
    ],
    "ldadamw": [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rho": "much"}, TypeError, "rho must be a number"),
        ({"error_feedback": 1}, TypeError, "error_feedback must be True or False"),
    ],
    "racs_adamw": [
        ({"decay": 1.0}, ValueError, "decay must be at least 0 and less than 1"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"scale": "big"}, TypeError, "scale must be a number"),
        ({"scale": float("inf")}, ValueError, "scale must be less than inf, got inf"),
        ({"norm_growth_limit": 1.0}, ValueError, "norm_growth_limit must be greater than 1"),
    ],
    "scale_sgd": [
        ({"norm": "max"}, ValueError, "norm must be one of rms, l2"),
        ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and less than 1"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
        ({"vector_ratio": "4"}, TypeError, "vector_ratio must be a number"),
    ],
}


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [(name, *wrong) for name, wrongs in WRONG_ARGUMENTS.items() for wrong in wrongs],
)
def test_wrong_arguments(name, settings, error, message):
    with pytest.raises(error, match=message):
        getattr(ng.contrib, name)(0.1, **settings)


PARAMS = {"bias": jnp.zeros(4), "lm_head": jnp.zeros((4, 9)), "wide": jnp.zeros((4, 6))}
WIDER = ("wide", (4, 9), r"\(4, 9\)")


@pytest.mark.parametrize(
    ("name", "settings", "nothing_selected", "gradients"),
    [
        ("alice_adamw", {"rank": 3}, "where selects no parameter", [WIDER]),
        ("apollo_adamw", {"rank": 3}, "where selects no parameter", [WIDER]),
        ("ldadamw", {"rank": 3}, "where selects no parameter", [WIDER]),
        (
            "racs_adamw",
            {},
            r"where selects no matrix to be scaled.*bias \(4,\)",
            [("wide", (4, 9), r"\(4, 9\).*columns")],
        ),
        # Only an output head and vectors have a state to compare with.
        (
            "scale_sgd",
            {},
            r"where selects no matrix to be normalised.*bias \(4,\)",
            [("lm_head", (4, 8), r"\(4, 8\).*\(4, 9\)"), ("bias", (5,), r"\(5,\)")],
        ),
    ],
)
def test_wrong_trees(name, settings, nothing_selected, gradients):
    tx = getattr(ng.contrib, name)(0.1, **settings)
    with pytest.raises(ValueError, match=nothing_selected):
        tx.init({"bias": PARAMS["bias"]})
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="only there: bias"):
        tx.update({k: v for k, v in PARAMS.items() if k != "bias"}, state, PARAMS)
    for leaf, shape, received in gradients:
        with pytest.raises(ValueError, match=f"{leaf}: the update has shape {received}"):
            tx.update(PARAMS | {leaf: jnp.zeros(shape)}, state, PARAMS)
    # A weight decay would broadcast them.
    others = PARAMS | {"wide": jnp.zeros((1, 6))}
    with pytest.raises(ValueError, match=r"wide: .*\(4, 6\), but the parameter has \(1, 6\)"):
        tx.update(PARAMS, state, others)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("apollo_adamw", {"rank": 3}),
        ("ldadamw", {"rank": 3}),
        ("racs_adamw", {}),
        ("scale_sgd", {}),
    ],
)
@pytest.mark.parametrize("mu_dtype", [None, jnp.float32, jnp.bfloat16])
def test_updates_have_the_dtype_of_the_parameters(name, settings, mu_dtype):
    tx = getattr(ng.contrib, name)(0.1, **settings, mu_dtype=mu_dtype)
    params = optax.tree.ones_like(PARAMS, dtype=jnp.float16)
    updates, _ = tx.update(params, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float16)}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_rates(name):
    factory = getattr(ng.contrib, name)
    with pytest.raises(TypeError, match="learning_rate must be a number, got 'fast'"):
        factory("fast")
    with pytest.raises(TypeError, match="weight_decay must be a number, got 'x'"):
        factory(0.1, weight_decay="x")
    with pytest.raises(ValueError, match=r"eps must be at least 0, got -1\.0"):
        factory(0.1, eps=-1.0)


@pytest.mark.parametrize(
    "inner",
    [
        lambda: ng.contrib.scale_by_ldadam(rank=2),
        lambda: ng.contrib.scale_by_apollo(rank=2),
        lambda: ng.contrib.scale_by_alice(rank=2, leading=1),
        ng.contrib.scale_by_racs,
    ],
)
def test_none_is_taken_inside_a_subspace(inner):
    tx = ng.chain(ng.low_rank_project(rank=4), inner(), ng.project_back())
    with pytest.raises(ValueError, match=r"inside a subspace.*after project_back"):
        tx.init({"w": jnp.zeros((8, 12))})
