"""Losses and perplexities against sums worked out in NumPy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run as tiny

import natgalore_jax as ng
from examples.common.metrics import of_kind
from examples.common.optimizers import OPTIMIZERS, OptimizerConfig
from examples.common.schedule import ScheduleConfig, warmup_cosine
from examples.llama.data import eval_batches
from examples.llama.loop import train
from examples.llama.training.evaluate import make_eval_step, mean_nll, perplexity
from examples.llama.training.train_step import mean_over_targets, token_nll

TABLE = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.25, 0.5, 0.25]])
TOKENS = np.array([0, 2, 1, 1, 2, 0, 0, 1, 2, 2, 1], np.int32)


def bigram_model(params, tokens):
    """Logits of a model that knows the probabilities of the next token given the last one."""
    return jnp.log(params)[tokens]


def test_every_token_weighs_the_same_in_the_perplexity():
    # Ten targets in batches of 2 x 3: the last batch is not full.
    by_hand = -sum(math.log(TABLE[a, b]) for a, b in itertools.pairwise(TOKENS)) / 10
    batches = list(eval_batches(TOKENS, 2, 3))
    table = jnp.array(TABLE, jnp.float32)
    loss = mean_nll(make_eval_step(bigram_model), table, batches)
    assert loss == pytest.approx(by_hand, rel=1e-6)

    # The mean over batches, which this is not, differs.
    step = make_eval_step(bigram_model)
    means = [mean_nll(step, table, [batch]) for batch in batches]
    assert abs(np.mean(means) - by_hand) > 1e-3


def test_loss_of_each_token():
    rows = TOKENS[:8].reshape(2, 4)
    expected = [[-math.log(TABLE[a, b]) for a, b in itertools.pairwise(r)] for r in rows]
    np.testing.assert_allclose(
        token_nll(bigram_model, jnp.array(TABLE, jnp.float32), rows), expected, rtol=1e-6
    )


def test_padding_has_no_loss_and_no_gradient():
    rows = jnp.array([[0, 2, 1, -1], [1, -1, -1, -1]])
    by_hand = -sum(math.log(TABLE[a, b]) for a, b in [(0, 2), (2, 1)]) / 2

    def loss(table, rows):
        return mean_over_targets(token_nll(bigram_model, table, rows), rows)

    table = jnp.array(TABLE, jnp.float32)
    value, gradient = jax.value_and_grad(loss)(table, rows)
    assert value == pytest.approx(by_hand, rel=1e-6)
    np.testing.assert_allclose(gradient, jax.grad(loss)(table, rows[:1, :3]))
    assert loss(table, jnp.full((1, 4), -1)) == 0.0


def test_perplexity_does_not_overflow():
    assert perplexity(math.log(5.0)) == pytest.approx(5.0)
    assert perplexity(1e4) == math.inf


@pytest.fixture(scope="module")
def result(fast_compile):
    config = tiny.run_config(
        steps=40, optimizer=OptimizerConfig(name="adamw"), output={"eval_every": 15}
    )
    return train(config, splits=tiny.splits())


def test_the_model_learns(result):
    first, *_, last = of_kind(result.records, "validation")
    assert last["loss"] < first["loss"]


def test_records(result):
    train_records = of_kind(result.records, "train")
    assert [r["step"] for r in train_records] == list(range(1, 41))
    assert [r["step"] for r in of_kind(result.records, "validation")] == [15, 30, 40]
    assert [r["tokens"] for r in train_records] == [16 * t for t in range(1, 41)]
    assert all(r["perplexity"] == pytest.approx(math.exp(r["loss"])) for r in result.records)


def test_final_perplexities_are_those_of_the_returned_parameters(result):
    """An evaluation of its own, in one batch, by NumPy."""
    for split in ("validation", "test"):
        tokens = getattr(result.splits, split)
        nll = 0.0
        for start in range(0, len(tokens) - 1, 8):
            row = tokens[start : start + 9]
            logits = np.asarray(result.apply(result.params, row[None, :-1]), np.float64)[0]
            log_sum = np.log(np.exp(logits).sum(-1))
            nll += (log_sum - np.take_along_axis(logits, row[1:, None], -1)[:, 0]).sum()
        loss = of_kind(result.records, split)[-1]["loss"]
        assert loss == pytest.approx(nll / (len(tokens) - 1), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    optimizer = OptimizerConfig(name="adamw", learning_rate=1e30)
    config = tiny.run_config(steps=30, optimizer=optimizer, output={"save_every": 1})
    result = train(config, splits=tiny.splits(), run_dir=tmp_path)
    assert result.diverged
    assert not result.finished
    assert result.steps < 30
    assert not of_kind(result.records, "test")


def test_an_optimizer_of_ones_own(result):
    """The same transformation by hand: the same losses, and no learning rate to record."""
    schedule = warmup_cosine(ScheduleConfig(), OPTIMIZERS["adamw"].learning_rate, 40)
    ratio = OPTIMIZERS["adamw"].unprojected_ratio
    assert ratio is not None
    tx = optax.partition(
        {
            True: optax.adamw(schedule, weight_decay=0.0),
            False: optax.adamw(lambda count: ratio * schedule(count), weight_decay=0.0),
        },
        jax.tree.map_with_path(ng.hidden_matrices, result.params),
    )
    own = train(result.config, splits=result.splits, tx=tx)
    assert [r["loss"] for r in own.records] == pytest.approx(
        [r["loss"] for r in result.records], rel=1e-5
    )
    assert "learning_rate" in result.records[0]
    assert "learning_rate" not in own.records[0]
