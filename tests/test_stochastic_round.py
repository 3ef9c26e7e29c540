"""Rounding to bfloat16 that is right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng
from natgalore_jax._src.kernels.dither import STRIDES, dither


def neighbours(x):
    bits = np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000
    return bits.view(np.float32), (bits + 0x10000).view(np.float32)


def test_every_result_is_a_neighbour_and_the_mean_is_exact():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 30)) * np.exp(5 * rng.standard_normal((40, 30)))).astype(
        np.float32
    )
    low, high = neighbours(x)
    steps = 1024
    rounded = jax.lax.map(
        lambda t: ng.training.stochastic_round(x, t).astype(jnp.float32), jnp.arange(steps)
    )
    rounded = np.asarray(rounded, np.float64)
    assert np.all((rounded == low) | (rounded == high))
    # Thresholds of golden-ratio steps: an error of about log(n)/n of a step, here with room.
    assert np.all(np.abs(rounded.mean(0) - x) <= 0.005 * np.abs(high - low))
    # Rounding to nearest would be wrong by a quarter of a step on average.
    nearest = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
    assert np.mean(np.abs(nearest - x) / np.abs(high - low)) > 0.2


def test_the_mean_over_elements_is_exact_too():
    x = jnp.full((500, 200), 1 + 2.0**-7 / 5)
    up = np.mean(np.asarray(ng.training.stochastic_round(x, 3), np.float32) > 1)
    assert abs(up - 0.2) < 4 * np.sqrt(0.2 * 0.8 / x.size)


def test_seeds_may_be_of_any_size():
    params, updates = [jnp.ones(64, jnp.bfloat16)] * 2, [jnp.full(64, 2.0**-9)] * 2
    new = [ng.training.apply_updates_stochastic(params, updates, 1, s) for s in (2**32 - 1, 2**40)]
    assert any(jnp.any(a != b) for a, b in zip(*new, strict=True))


def test_seeds_may_be_integers_of_numpy():
    x = jnp.full(99, 1 + 2.0**-9)
    for seed in (np.int32(3), np.int64(3)):
        np.testing.assert_array_equal(
            ng.training.stochastic_round(x, 5, seed), ng.training.stochastic_round(x, 5, 3)
        )


def test_what_is_no_number_between_others_stays():
    x = jnp.array([np.inf, -np.inf, np.nan, 0.0, 1.5, -(2.0**-100)], jnp.float32)
    out = np.asarray(ng.training.stochastic_round(x, 7), np.float32)
    np.testing.assert_array_equal(out, np.asarray(x))


def test_small_updates_of_bfloat16_weights_add_up():
    params = {"w": jnp.ones((50, 40), jnp.bfloat16), "b": jnp.ones(3)}
    updates = {"w": jnp.full((50, 40), 2.0**-7 / 100), "b": jnp.full(3, 1e-3)}
    stochastic, nearest = params, params
    for t in range(200):
        stochastic = ng.training.apply_updates_stochastic(stochastic, updates, t)
        nearest = optax.apply_updates(nearest, updates)
    assert stochastic["w"].dtype == jnp.bfloat16
    assert np.all(np.asarray(nearest["w"], np.float32) == 1)
    np.testing.assert_array_equal(stochastic["b"], nearest["b"])
    # Each entry was rounded 200 times; 2,000 of them know the mean of the sum well.
    np.testing.assert_allclose(np.mean(stochastic["w"].astype(jnp.float32)), 1 + 2 * 2.0**-7, 1e-3)


def test_errors():
    with pytest.raises(TypeError, match="floating-point arrays, got int32"):
        ng.training.stochastic_round(jnp.arange(3), 0)
    for step in (2.7, jnp.float32(1), jnp.arange(3)):
        with pytest.raises(TypeError, match="step must be a scalar integer, got"):
            ng.training.stochastic_round(jnp.ones(3), step)
    with pytest.raises(TypeError, match="seed must be an integer"):
        ng.training.stochastic_round(jnp.ones(3), 0, seed=0.5)


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_layers_one_by_one_are_rounded_as_their_stack(shape):
    whole = dither(shape, 5, 1, STRIDES[0])
    for layer in range(4):
        alone = dither((1, *shape[1:]), 5, 1, STRIDES[0], first=layer)
        np.testing.assert_array_equal(alone[0], whole[layer])
    assert len(np.unique(whole)) == whole.size
