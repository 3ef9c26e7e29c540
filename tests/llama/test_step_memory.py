"""The memory of a step: what is predicted is what the compiler and the arrays have."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import optax
import pytest
from tiny_run import MODEL, Notes, run_config, splits

import natgalore_jax as ng
from examples.common.optimizers import OptimizerConfig
from examples.common.train_state import init_state
from examples.llama.loop import train
from examples.llama.memory.step_memory import (
    live_gradients,
    lower_bound,
    of_compiled,
    predict,
    saved_bytes,
)
from examples.llama.training.build import abstract_run, first_state
from examples.llama.training.per_layer import make_per_layer_step
from examples.llama.training.train_step import make_model, make_train_step

pytestmark = pytest.mark.usefixtures("fast_compile")

GALORE = OptimizerConfig(name="galore", rank=4, update_interval=5, moment_bits=8)
HIDDEN = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)  # numbers in the matrices of both layers
TABLE = 48 * 16


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("per_layer", [False, True])
def test_float32_is_what_the_compiler_reserves_for_real_arrays(per_layer):
    config = run_config(optimizer=GALORE, per_layer=per_layer)
    tx = ng.galore_adamw(1e-2, rank=4, update_interval=5, moment_bits=8)
    memory = predict(config, tx)

    apply, params = make_model(config.model, 0)
    state = init_state(params, tx)
    rows = jnp.zeros((2, 9), jnp.int32)
    make = make_per_layer_step(config, tx, params) if per_layer else make_train_step(apply, tx)
    compiled = make.lower(state, rows).compile()
    analysis = compiled.memory_analysis()
    assert (
        memory.total
        == sum(memory.parts.values())
        == (
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
            + analysis.temp_size_in_bytes
        )
    )
    assert memory.weights == nbytes(params)
    assert sum(memory.state.values()) == nbytes(state.opt_state)
    assert sum(memory.temporary.values()) == analysis.temp_size_in_bytes
    assert all(size >= 0 for size in memory.parts.values())
    # The program's own account of what it runs: another division of the same sum.
    assert of_compiled(compiled, state, tx, per_layer).total == memory.total


def test_what_stays_needs_no_compiler():
    config = run_config(optimizer=dataclasses.replace(GALORE, residual="none"), accumulate=3)
    config = dataclasses.replace(config, accumulate_in_subspace=True)
    run = abstract_run(config)
    memory = lower_bound(run)
    state = init_state(make_model(config.model, 0)[1], run.tx, low_rank=run.optimization.low_rank)
    assert sum(memory.state.values()) == nbytes((state.opt_state, state.accumulated))
    assert memory.weights + sum(memory.state.values()) + memory.batch == nbytes(
        (state, state.totals)
    ) + 4 * 2 * (8 + 1)


def test_weights_in_8_bits_are_counted_as_they_are_stored():
    config = run_config(optimizer=GALORE, per_layer=True, weight_bits=8)
    run = abstract_run(config)
    state = first_state(config, run.optimization, make_model(config.model, 0)[1], {})
    memory = lower_bound(run)
    assert (
        memory.weights
        == nbytes(state.params)
        < 0.6 * lower_bound(abstract_run(dataclasses.replace(config, weight_bits=None))).weights
    )
    assert memory.total - sum(memory.temporary.values()) == nbytes((state, state.totals)) + 72
    # The gradients are numbers all the same.
    assert memory.temporary["gradients"] == 4 * (HIDDEN // 2 + 2 * 16)


def test_live_gradients_by_hand():
    params = abstract_run(run_config(optimizer=OptimizerConfig(name="adamw"))).params
    one_layer = HIDDEN // 2 + 2 * 16
    assert live_gradients(params, per_layer=False) == 4 * (2 * one_layer + 2 * TABLE + 16)
    assert live_gradients(params, per_layer=True) == 4 * one_layer
    tied = {key: value for key, value in params.items() if key != "head"}
    assert live_gradients(tied, per_layer=True) == 4 * (one_layer + TABLE + 16)


@pytest.mark.parametrize("per_layer", [False, True])
def test_bfloat16_is_counted_half_where_it_is_half(per_layer):
    full = run_config(optimizer=GALORE, per_layer=per_layer)
    model = dataclasses.replace(MODEL, dtype="bfloat16", param_dtype="bfloat16")
    half = dataclasses.replace(full, model=model)
    one, two = predict(half), predict(full)
    assert one.weights == two.weights // 2
    assert one.temporary["gradients"] == live_gradients(abstract_run(half).params, per_layer)
    assert 2 * one.temporary["gradients"] == live_gradients(abstract_run(full).params, per_layer)
    # The optimizer's step may need less than plain descent, whose activations are counted.
    of_descent = lower_bound(abstract_run(full)).temporary["activations"]
    assert two.temporary["activations"] <= of_descent
    ratio = one.temporary["activations"] / of_descent
    assert ratio == pytest.approx(saved_bytes(half) / saved_bytes(full), rel=0.01)
    # Between all in bfloat16 and all in float32: logits and norms are float32 in both.
    assert 0.5 < ratio < 1
    factor = 1 if per_layer else 0.5
    assert one.temporary["update"] == pytest.approx(factor * two.temporary["update"], abs=1)


def test_a_run_says_what_its_step_takes_and_compiles_it_once(caplog):
    notes = Notes()
    config = run_config({"eval_every": 10}, steps=4, optimizer=OptimizerConfig(name="adamw"))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        result = train(config, splits=splits(), reporter=notes)
    compiled = [r for r in caplog.records if "Finished XLA compilation of jit(step)" in r.message]
    # The step, and that of evaluations, which has the same name.
    assert len(compiled) == 2
    memory = result.memory.predicted
    assert memory.weights == nbytes(result.params)
    assert memory.total > 3 * memory.weights
    assert any(text.startswith("memory of a step: ") for text in notes.notes)
    record = result.memory.to_dict()
    assert record["predicted"]["total"] == record["peak"]["step"] == memory.total
    assert record["peak"]["device"] is None and record["peak"]["process"] > memory.total


def test_plain_descent_has_no_update_to_speak_of():
    memory = predict(run_config(optimizer=OptimizerConfig(name="adamw")), optax.sgd(1.0))
    assert memory.temporary["update"] == 0 and set(memory.state) <= {"shared"}
