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


def abstract_params(preset):
    config = dataclasses.replace(MODEL_PRESETS[preset], param_dtype="bfloat16", stacked=True)
    return jax.eval_shape(lambda: make_model(config, 0)[1])


@pytest.mark.parametrize("preset", ["60m", "130m", "350m", "1b", "7b"])
def test_at_most_a_tenth_above_galore(preset):
    params, rank = abstract_params(preset), RUN_PRESETS[preset]["optimizer"].rank
    galore, ours = (
        ng.memory_report(factory(1e-2, rank=rank), params).total_state_bytes
        for factory in (ng.galore_adamw, ng.natural_galore_adamw)
    )
    assert galore < ours <= 1.1 * galore


def test_a_history_is_far_above():
    params = {"layers": jax.ShapeDtypeStruct((4, 512, 1376), jnp.bfloat16)}
    galore, history = (
        ng.memory_report(tx, params).total_state_bytes
        for tx in (ng.galore_adamw(1e-2), composed_adamw("stored", 1e-2, history=10))
    )
    assert history > 3 * galore
