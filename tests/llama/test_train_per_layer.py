"""The program's per-layer step: the run of the ordinary one."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from tiny_run import MODEL, NATURAL_GALORE, run_config, splits

import natgalore_jax as ng
from examples.llama.adapters import AdapterConfig
from examples.llama.loop import train
from examples.llama.metrics import of_kind
from examples.llama.optimizers import OptimizerConfig
from examples.llama.train_config import ConfigError

pytestmark = pytest.mark.usefixtures("fast_compile")


def run(**changes):
    config = run_config({"eval_every": 10}, steps=20, **changes)
    return train(config, splits=splits())


def assert_same_run(**changes):
    """Losses, norms and optimizer state, over refreshes."""
    ordinary, ours = run(**changes), run(per_layer=True, **changes)
    for kind, name in ("train", "loss"), ("train", "grad_norm"), ("validation", "loss"):
        expected = [record[name] for record in of_kind(ordinary.records, kind)]
        actual = [record[name] for record in of_kind(ours.records, kind)]
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert jax.tree.structure(ours.state) == jax.tree.structure(ordinary.state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-4),
        ours.params,
        ordinary.params,
    )


def test_same_run():
    assert_same_run(optimizer=dataclasses.replace(NATURAL_GALORE, history=None))


def test_same_run_with_tied_embeddings_and_batches_accumulated():
    assert_same_run(model=dataclasses.replace(MODEL, tied_embeddings=True), accumulate=2)


def test_same_run_with_batches_accumulated_in_the_subspace():
    galore = OptimizerConfig(name="galore", rank=4, update_interval=5, residual="none")
    assert_same_run(optimizer=galore, accumulate=2, accumulate_in_subspace=True)


def test_clipping_takes_the_norm_of_the_step_before():
    config = OptimizerConfig(name="adamw", clip_norm=0.01, learning_rate=1e-3, eps=1e-2)
    ours = run(per_layer=True, optimizer=config)
    without = run(per_layer=True, optimizer=dataclasses.replace(config, clip_norm=None))
    losses = [[r["loss"] for r in of_kind(x.records, "train")] for x in (ours, without)]
    assert losses[0][:2] == losses[1][:2]  # The first step has none before it.
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": dataclasses.replace(MODEL, stacked=False)}, "--model.stacked"),
        ({"adapter": AdapterConfig(kind="lora", rank=2)}, "adapters, got lora"),
        ({"accumulate": 2, "optimizer": OptimizerConfig(clip_norm=1.0, rank=4)}, "accumulate=2"),
    ],
)
def test_what_it_cannot_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        run_config(per_layer=True, **changes)


def test_an_optimizer_that_mixes_parameters_is_refused():
    tx = optax.chain(optax.clip_by_global_norm(1.0), ng.galore_adamw(1e-2, rank=4))
    with pytest.raises(ConfigError, match=r"--per-layer with .*depends on"):
        train(run_config(per_layer=True), splits=splits(), tx=tx)
