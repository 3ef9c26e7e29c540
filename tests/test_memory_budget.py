"""The default optimizer's state beside GaLore's at the same rank, from shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from composed import composed_adamw

import natgalore_jax as ng
from examples.llama.model.config import MODEL_PRESETS
from examples.llama.run_config import RUN_PRESETS
from examples.llama.training.train_step import make_model


def abstract_params(preset, dtype="bfloat16"):
    config = dataclasses.replace(MODEL_PRESETS[preset], param_dtype=dtype, stacked=True)
    return jax.eval_shape(lambda: make_model(config, 0)[1])


@pytest.mark.parametrize("preset", ["60m", "130m", "350m", "1b", "7b"])
def test_at_most_a_tenth_above_galore(preset):
    params, rank = abstract_params(preset), RUN_PRESETS[preset]["optimizer"].rank
    galore, ours = (
        ng.memory_report(factory(1e-2, rank=rank), params).total_state_bytes
        for factory in (ng.galore_adamw, ng.natural_galore_adamw)
    )
    assert galore < ours <= 1.1 * galore


LEAN_PERCENT = dict(
    zip(
        ("nano", "9m", "60m", "130m", "350m", "1b", "7b"),
        (5.2, 7.3, 8.2, 6.0, 4.1, 3.1, 2.5),
        strict=True,
    )
)


@pytest.mark.parametrize("preset", LEAN_PERCENT)
def test_the_lean_state_over_adamws(preset):
    tx = ng.lean_natural_galore_adamw(1e-2, rank=MODEL_PRESETS[preset].hidden // 16)
    report = ng.memory_report(tx, abstract_params(preset, "float32"))
    percent = 100 * report.total_state_bytes / report.adamw_state_bytes
    assert round(percent, 1) == LEAN_PERCENT[preset]


def test_a_history_is_far_above():
    params = {"layers": jax.ShapeDtypeStruct((4, 512, 1376), jnp.bfloat16)}
    galore, history = (
        ng.memory_report(tx, params).total_state_bytes
        for tx in (ng.galore_adamw(1e-2), composed_adamw("stored", 1e-2, history=10))
    )
    assert history > 3 * galore
