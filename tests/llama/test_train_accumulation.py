"""Gradient accumulation in the subspace: the numbers of large batches, with a small accumulator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run as tiny

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.common.metrics import of_kind
from examples.common.optimizers import OptimizerConfig
from examples.llama.__main__ import parse
from examples.llama.data import make_train_iterator
from examples.llama.loop import train
from examples.llama.training.build import abstract_run
from examples.llama.training.optimization import make_optimization
from examples.llama.training.train_step import make_model, token_nll

pytestmark = pytest.mark.usefixtures("fast_compile")

OPTIMIZER = dataclasses.replace(tiny.NATURAL_GALORE, residual="none")


def run_config(optimizer=OPTIMIZER, accumulate=2, **changes):
    changes = {"accumulate_in_subspace": accumulate > 1, **changes}
    return tiny.run_config(optimizer=optimizer, accumulate=accumulate, **changes)


def losses(result):
    return [record["loss"] for record in of_kind(result.records, "train")]


@pytest.fixture(scope="module")
def whole(fast_compile):
    return train(run_config(), splits=tiny.splits())


def test_a_basis_that_needs_no_gradient_gives_the_losses_of_one_large_batch():
    optimizer = dataclasses.replace(OPTIMIZER, name="galore", method="gaussian")
    small = train(run_config(optimizer), splits=tiny.splits())
    large = train(run_config(optimizer, accumulate=1, batch_size=4), splits=tiny.splits())
    assert small.steps == large.steps == 8  # with a refresh after 5
    np.testing.assert_allclose(losses(small), losses(large), rtol=1e-4)
    assert losses(small)[-1] < losses(small)[0]


def test_the_first_batch_of_a_step_decides_its_basis(whole):
    """The same run by hand, from full gradients."""
    config, splits = run_config().with_vocabulary(tiny.VOCAB), tiny.splits()
    apply, params = make_model(config.model, config.seed)
    # The optimizer of the run, and its parts.
    tx, _, steps = make_optimization(config, params)
    opt_state = tx.init(params)
    batches = make_train_iterator(splits.train, batch_size=2, seq_len=8, seed=config.seed)
    gradient = jax.jit(jax.value_and_grad(lambda p, rows: token_nll(apply, p, rows).mean()))

    @jax.jit
    def step(first, second, opt_state, params):
        opt_state = steps.refresh(first, opt_state)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        updates, opt_state = steps.update(steps.project(mean, opt_state), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    expected = []
    for _ in range(config.steps):
        (first_loss, first), (second_loss, second) = (
            gradient(params, next(batches)["tokens"]) for _ in range(2)
        )
        params, opt_state = step(first, second, opt_state, params)
        expected.append(float(first_loss + second_loss) / 2)
    np.testing.assert_allclose(losses(whole), expected, rtol=1e-4)


def test_the_accumulator_is_low_rank_and_the_optimizer_runs_once_a_step(whole):
    moments = optax.tree.get(whole.state.opt_state, "mu")
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (whole.state.accumulated, moments)]
    assert shapes[0] == shapes[1] != jax.tree.map(jnp.shape, whole.params)
    assert int(whole.state.opt_state[0].count) == 8
    assert int(whole.state.micro_step) == 16
    # The mean of the last step is left over; a whole one.
    assert all(bool(jnp.any(x != 0)) for x in jax.tree.leaves(whole.state.accumulated))
    assert abstract_run(run_config(accumulate=1)).state.accumulated == {}


def test_nothing_moves_within_a_step():
    part = train(run_config(), splits=tiny.splits(), should_stop=tiny.after(3))
    step = train(run_config(), splits=tiny.splits(), should_stop=tiny.after(2))
    jax.tree.map(np.testing.assert_array_equal, part.params, step.params)
    assert int(part.state.opt_state[0].count) == 1


def test_resume_within_an_accumulation_is_exact(tmp_path, whole):
    # Without an evaluation in between, of whose batches `should_stop` is asked too.
    config = run_config(output={"save_every": 100, "eval_every": 8, "resume": True})
    done = 0
    for batches in (3, 1, 7):  # inside, between, inside
        part = train(
            config, splits=tiny.splits(), run_dir=tmp_path, should_stop=tiny.after(batches)
        )
        done += batches
        assert int(part.state.micro_step) == done
    result = train(config, splits=tiny.splits(), run_dir=tmp_path)
    tiny.assert_same_bits(result.state, whole.state)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (tiny.NATURAL_GALORE, "the residual of natural-galore.*--residual none"),
        (OptimizerConfig(name="fira", rank=4), "the residual of fira"),
        (OptimizerConfig(name="adamw"), "with a subspace, such as galore: adamw: low_rank_steps"),
        (OptimizerConfig(name="ldadam", rank=4), "with a subspace, such as galore: ldadam"),
    ],
)
def test_optimizers_that_need_the_whole_gradient_are_refused(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        train(run_config(optimizer), splits=tiny.splits())


def test_it_is_an_option_that_excludes_clipping():
    config = parse(["--accumulate", "4", "--accumulate-in-subspace", "--residual", "none"])
    assert config.accumulate_in_subspace and not parse([]).accumulate_in_subspace
    with pytest.raises(ConfigError, match=r"clip_norm=1\.0 needs the whole gradient"):
        run_config(dataclasses.replace(OPTIMIZER, clip_norm=1.0))


def test_a_given_optimizer_is_taken_apart_too():
    tx = ng.galore_adamw(0.01, rank=4)
    result = train(run_config(), splits=tiny.splits(), tx=tx)
    assert int(result.state.opt_state[0].count) == result.steps == 8
    with pytest.raises(ConfigError, match="hides the subspace"):
        train(run_config(), splits=tiny.splits(), tx=optax.chain(tx))
