"""Learning rates against values worked out by hand, and what weight decay acts on."""

import dataclasses
from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run as tiny

from examples.common.optimizers import OPTIMIZERS, OptimizerConfig, decayed, make_optimizer
from examples.common.schedule import ScheduleConfig, warmup_cosine
from examples.llama.__main__ import parse
from examples.llama.model.config import MODEL_PRESETS
from examples.llama.run_config import run_preset
from examples.llama.training.train_step import make_model


def test_warmup_and_cosine():
    # Four warm-up steps of 21; then half a cosine over the 16 steps from 4 to 20.
    schedule = warmup_cosine(ScheduleConfig(warmup=4 / 21, floor=0.1), peak=1.0, steps=21)
    expected = {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 12: 0.55, 20: 0.1}
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-6), step


def test_without_warmup_the_first_step_has_the_peak():
    schedule = warmup_cosine(ScheduleConfig(warmup=0.0, floor=0.0), peak=0.5, steps=11)
    assert [float(schedule(t)) for t in (0, 5, 10)] == pytest.approx([0.5, 0.25, 0.0])


@pytest.mark.parametrize("steps", [1, 2])
def test_shortest_runs(steps):
    schedule = warmup_cosine(ScheduleConfig(warmup=0.5), peak=1.0, steps=steps)
    assert all(0 < float(schedule(t)) <= 1 for t in range(steps))


@pytest.mark.parametrize("stacked", [False, True])
def test_weight_decay_leaves_norms_alone(stacked):
    config = dataclasses.replace(tiny.MODEL, stacked=stacked)
    params = jax.eval_shape(lambda: make_model(config, seed=0)[1])
    flat = jax.tree_util.tree_leaves_with_path(decayed(params))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): flag for path, flag in flat}
    assert any(names.values())
    assert {name for name, flag in names.items() if not flag} == {
        name for name in names if name.endswith("scale")
    }


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_downhill(name):
    takes_decay = "weight_decay" in signature(OPTIMIZERS[name].factory).parameters
    weight_decay = 0.1 if takes_decay else 0.0
    config = OptimizerConfig(name=name, rank=2, clip_norm=1.0, weight_decay=weight_decay)
    tx, _ = make_optimizer(config, ScheduleConfig(), steps=10, accumulate=1, seed=0)
    params = {"mlp": {"kernel": jnp.eye(8, 6)}, "norm": {"scale": jnp.ones(6)}}
    grads = jax.tree.map(lambda p: 0.1 * p, params)
    updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    assert inner_product(updates, grads) < 0


@pytest.mark.usefixtures("fast_compile")
@pytest.mark.parametrize(
    "name", [n for n, e in OPTIMIZERS.items() if "weight_decay" in signature(e.factory).parameters]
)
def test_weight_decay_is_a_share_of_the_learning_rate(name):
    """As in AdamW, of every optimizer; updates of zero gradients are the decay alone."""
    factory, fixed = OPTIMIZERS[name].factory, OPTIMIZERS[name].fixed
    if "rank" in signature(factory).parameters:
        fixed = {"rank": 2, **fixed}
    tx = factory(lambda count: 0.01 * (count + 1), weight_decay=0.1, **fixed)
    params = {"mlp": {"kernel": jnp.full((8, 6), 2.0)}}
    zeros, state, update = optax.tree.zeros_like(params), tx.init(params), jax.jit(tx.update)
    for step in range(2):
        updates, state = update(zeros, state, params)
        np.testing.assert_allclose(
            updates["mlp"]["kernel"], -0.1 * 0.01 * (step + 1) * 2.0, rtol=1e-5
        )


def inner_product(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_accumulated_gradients_are_averaged_then_clipped():
    config = OptimizerConfig(name="adamw", clip_norm=0.5)
    kwargs = {"schedule": ScheduleConfig(), "steps": 4, "seed": 0}
    single, _ = make_optimizer(config, accumulate=1, **kwargs)
    double, _ = make_optimizer(config, accumulate=2, **kwargs)
    params = {"kernel": jnp.ones((2, 3))}
    first = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    second = {"kernel": jnp.array([[4.0, -2.0, 0.5], [0.0, 1.0, -9.0]])}
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)

    state = double.init(params)
    nothing, state = double.update(first, state, params)
    update, _ = double.update(second, state, params)
    expected, _ = single.update(mean, single.init(params), params)

    assert not jnp.any(nothing["kernel"])
    assert jnp.allclose(update["kernel"], expected["kernel"], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "natural-galore", "lean-natural-galore"])
def test_default_rates_follow_the_width(name):
    """Of random weights: hidden matrices train at rates that fall with it, the others do not."""

    def rates(preset, *more):
        config = parse(["--optimizer", name, "--preset", preset, *more])
        return config.learning_rate, config.unprojected_ratio

    nano, ratio = rates("nano")
    assert rates("9m") == pytest.approx((nano / 2, 2 * ratio))
    assert rates("60m") == pytest.approx((nano / 4, 4 * ratio))
    assert rates("60m", "--adapter.kind", "lora") == (nano, ratio)
    assert rates("60m", "--learning-rate", "0.01") == (0.01, pytest.approx(4 * ratio))
    assert rates("60m", "--unprojected-ratio", "2") == pytest.approx((nano / 4, 2))
    # The measured ones of docs/pretrained.md: embedding and norms at 3e-5.
    trained = 1e-4 if "adamw" in name else 3e-4
    assert rates("60m", "--init-from", "x") == pytest.approx((trained, 3e-5 / trained))
    assert parse(["--optimizer", "galore", "--preset", "60m"]).learning_rate == 0.02
    assert parse(["--optimizer", "apollo", "--init-from", "x"]).learning_rate == pytest.approx(1e-4)


def test_learning_rate_given_or_the_optimizers_own():
    for given, expected in ((None, OPTIMIZERS["adamw"].learning_rate), (0.25, 0.25)):
        config = OptimizerConfig(name="adamw", learning_rate=given)
        schedule = make_optimizer(config, ScheduleConfig(warmup=0), steps=5, accumulate=1, seed=0)[
            1
        ]
        assert float(schedule(0)) == pytest.approx(expected)


def test_presets_fit_their_models():
    for name, model in MODEL_PRESETS.items():
        config = run_preset(name)
        assert config.model == model
        assert config.optimizer.rank < model.hidden
        assert config.data.vocab_size == model.vocab_size


def test_what_a_published_variant_fixes_cannot_be_changed(monkeypatch):
    entry = OPTIMIZERS["adamw"]._replace(fixed={"b2": 0.95})
    monkeypatch.setitem(OPTIMIZERS, "published", entry)
    kwargs = {"schedule": ScheduleConfig(), "steps": 4, "accumulate": 1, "seed": 0}
    params, grads = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.arange(6.0).reshape(2, 3)}

    def second_update(config):
        tx, _ = make_optimizer(config, **kwargs)
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(jax.tree.map(jnp.square, grads), state, params)[0]["kernel"]

    published = second_update(OptimizerConfig(name="published"))
    assert jnp.array_equal(published, second_update(OptimizerConfig(name="adamw", b2=0.95)))
    assert not jnp.allclose(published, second_update(OptimizerConfig(name="adamw")))
    with pytest.raises(ValueError, match=r"b2 is always 0.95, got 0.9"):
        make_optimizer(OptimizerConfig(name="published", b2=0.9), **kwargs)


@pytest.mark.parametrize("preset", ["nano", "60m", "1b"])
@pytest.mark.parametrize("optimizer", ["adamw", "natural-galore", "galore"])
def test_a_rate_that_is_given_leaves_the_ratio_of_the_two_rates(preset, optimizer):
    given = ["--preset", preset, "--optimizer", optimizer]
    default = parse(given)
    again = parse([*given, "--learning-rate", repr(default.learning_rate)])
    half = parse([*given, "--learning-rate", repr(default.learning_rate / 2)])
    assert again.learning_rate == default.learning_rate
    assert again.unprojected_ratio == half.unprojected_ratio == default.unprojected_ratio
