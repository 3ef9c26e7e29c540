"""Weights, gradients and losses that are not finite: the run ends, its good checkpoints stay."""

import faulty_run
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run as tiny
from faulty_run import batches, bigrams, rare, run_config

from examples.common.checkpoints import Checkpoints, kept
from examples.common.metrics import of_kind, read_metrics
from examples.common.train_state import are_finite, init_state
from examples.llama.loop import train
from examples.llama.training.train_step import make_train_step

pytestmark = pytest.mark.usefixtures("fast_compile")

model = pytest.fixture(faulty_run.model)


@pytest.mark.parametrize("keep", [{"keep": 1}, {"keep": 1, "keep_best": 1}])
def test_weights_that_an_update_made_infinite_are_not_saved(model, tmp_path, keep):
    """A finite loss and a finite gradient come before them; a lower rate goes on from before."""
    model()
    output = {"save_every": 2, "eval_every": 2, "resume": True, **keep}

    def run(steps, rate):
        config = run_config(rate, steps=steps, output=output)
        return train(config, splits=tiny.splits(), run_dir=tmp_path)

    assert run(2, 0.01).finished
    lost = run(4, 1e38)
    assert lost.diverged_at in (3, 4) and not lost.finished
    assert kept(tmp_path / "checkpoints") == [2]
    assert run(4, 0.01).finished


@pytest.mark.parametrize("number", [2, 7])  # The last step of 8 has no next one whose loss tells.
def test_a_gradient_that_is_not_finite_ends_the_run(model, tmp_path, number):
    bad, token = rare(number)
    model(gradient=(token, jnp.nan))
    config = run_config(steps=bad + 1 if number == 7 else 16, output={"save_every": 1})
    result = train(config, splits=tiny.splits(), run_dir=tmp_path)
    assert result.diverged_at == bad + 1 and not result.finished
    assert of_kind(result.records, "train")[-1]["step"] == bad + 1
    assert max(kept(tmp_path / "checkpoints")) == bad


def test_an_optimizer_of_ones_own_may_leave_gradients_out(model):
    bad, token = rare(2)
    model(gradient=(token, jnp.nan))
    tx = optax.apply_if_finite(optax.adamw(0.01), max_consecutive_errors=2)
    result = train(run_config(steps=bad + 3), splits=tiny.splits(), tx=tx)
    assert result.finished and are_finite(result.params)


def test_a_gradient_that_is_not_finite_is_a_spike(model, tmp_path):
    bad, token = rare(5)
    model(gradient=(token, jnp.inf))
    config = run_config(rollback_on_spike=3.0, output={"save_every": 2})
    result = train(config, splits=tiny.splits(), run_dir=tmp_path)
    assert result.finished and are_finite(result.params)
    (record,) = of_kind(result.records, "rollback")
    assert record["spike"] == bad + 1 and record["step"] == bad // 2 * 2 + 1


def test_a_dropped_batch_stays_known_when_the_run_is_stopped_in_its_step(model, tmp_path):
    bad, token = rare(5)
    model(gradient=(token, jnp.nan))
    options = {"skip_nonfinite": True, "accumulate": 4, "steps": 3}
    output = {"save_every": 2, "eval_every": 50, "resume": True}

    def run(name, **how):
        config = run_config(**options, output=output)
        train(config, splits=tiny.splits(), run_dir=tmp_path / name, **how)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        return [(r["kind"], r["step"]) for r in records]

    whole = run("whole")
    assert ("skipped", bad // 4 + 1) in whole
    run("parts", should_stop=tiny.after(bad + 1))  # It is asked before the first one too.
    assert run("parts") == whole


def test_the_best_checkpoint_is_one_of_a_finite_loss(tmp_path):
    state = init_state({"w": jnp.zeros(2)}, optax.sgd(0.1))
    with Checkpoints(tmp_path / "checkpoints", keep=1, keep_best=2) as checkpoints:
        for step, loss in enumerate([4.0, 5.0, 6.0, np.nan, np.inf, 0.1], start=1):
            checkpoints.save(state._replace(micro_step=jnp.int32(step)), {}, {}, loss=loss)
    assert kept(tmp_path / "checkpoints") == [1, 6]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_are_dropped_with_weights_in_16_bits(dtype, accumulate):
    apply, params = bigrams(gradient=(7, jnp.nan))
    tx = optax.adamw(0.1)
    state = init_state(jax.tree.map(lambda x: x.astype(dtype), params), tx)
    step = make_train_step(apply, tx, accumulate, skip_nonfinite=True)
    rows = jnp.asarray(batches(1)[0])
    for first, skipped in ((8, False), (7, True), (8, False)):
        state, metrics = step(state, rows.at[0, 0].set(first))
        assert bool(metrics["skipped"]) == skipped
        assert metrics["grad_norm"].dtype == metrics["loss"].dtype == jnp.float32
