"""The program's per-layer step: the run of the ordinary one (another one: test_devices.py)."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from tiny_run import MODEL, NATURAL_GALORE, after, assert_same_run, run_config, splits

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.common.metrics import of_kind
from examples.common.optimizers import OptimizerConfig
from examples.llama.loop import train
from examples.llama.model.adapters import AdapterConfig
from examples.llama.run_config import OutputConfig
from examples.llama.training.build import abstract_run, make_step

pytestmark = pytest.mark.usefixtures("fast_compile")

GALORE = OptimizerConfig(name="galore", rank=4, update_interval=5, residual="none")


def run(**changes):
    config = run_config({"eval_every": 10}, steps=20, **changes)
    return train(config, splits=splits())


def check_both_steps(**changes):
    """Over refreshes."""
    assert_same_run(run(per_layer=True, **changes), run(**changes))


def test_same_run_with_tied_embeddings_and_batches_accumulated():
    check_both_steps(model=dataclasses.replace(MODEL, tied_embeddings=True), accumulate=2)


def test_same_run_with_batches_accumulated_in_the_subspace():
    check_both_steps(optimizer=GALORE, accumulate=2, accumulate_in_subspace=True)


def test_a_plan_of_batches_accumulated_in_the_subspace():
    changes = {"accumulate": 2, "accumulate_in_subspace": True, "per_layer": True}
    found = abstract_run(run_config(optimizer=GALORE, **changes))
    # After the state of the whole stack has been traced.
    make_step(found.config, found.apply, found.optimization, found.params)


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
        ({"offload": "state", "accumulate_in_subspace": True}, "hides the subspace"),
        ({"offload": "weights", "weight_bits": 8}, "--weight-bits keeps weights on the device"),
    ],
)
def test_what_it_cannot_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        run_config(per_layer=True, **changes)


@pytest.mark.parametrize(
    ("offload", "bits", "optimizer"),
    [
        ("state", None, dataclasses.replace(NATURAL_GALORE, rank=40)),
        ("state", 8, dataclasses.replace(GALORE, rank=40)),
        ("weights", None, OptimizerConfig(name="adamw")),
    ],
)
def test_same_run_from_host_memory(offload, bits, optimizer, tmp_path):
    """Stopped and resumed: what was on the host when it was saved is there again."""
    changes = {
        "optimizer": optimizer,
        "model": dataclasses.replace(MODEL, hidden=64, intermediate=72),
        "per_layer": True,
        "weight_bits": bits,
    }
    expected = run(**changes)
    config = run_config({"eval_every": 10}, steps=20, offload=offload, **changes)
    train(config, splits=splits(), run_dir=tmp_path, should_stop=after(10))
    resumed = dataclasses.replace(config, output=dataclasses.replace(config.output, resume=True))
    ours = train(resumed, splits=splits(), run_dir=tmp_path)
    for kind in "train", "validation":
        losses = [[r["loss"] for r in of_kind(x.records, kind)] for x in (ours, expected)]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    for tree, large_ones in (ours.state.opt_state, True), (ours.params, offload == "weights"):
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.size >= 4096}
        assert kinds == {"pinned_host" if large_ones else "device"}


def test_weights_in_8_bits(tmp_path):
    """The run of floats nearly; stopped and resumed, the same bits."""
    galore = OptimizerConfig(name="galore", rank=4, update_interval=5, basis_dtype="int8")
    floats, ours = (run(per_layer=True, optimizer=galore, weight_bits=bits) for bits in (None, 8))
    for kind in "train", "validation", "test":
        losses = [[r["loss"] for r in of_kind(x.records, kind)] for x in (ours, floats)]
        np.testing.assert_allclose(*losses, rtol=0.01)
    assert ours.state.params.codes["layers"]["attention"]["q"]["kernel"].dtype == np.int8
    assert jax.tree.structure(ours.params) == jax.tree.structure(floats.params)

    config = dataclasses.replace(ours.config, output=OutputConfig(eval_every=10, resume=True))
    train(config, splits=splits(), run_dir=tmp_path, should_stop=after(10))
    resumed = train(config, splits=splits(), run_dir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, ours.state)


def test_weights_in_8_bits_are_for_updates_per_layer():
    with pytest.raises(ConfigError, match=r"--weight-bits .* needs --per-layer"):
        run_config(weight_bits=8)


def test_weights_are_offloaded_by_layer_only():
    with pytest.raises(ConfigError, match="needs --per-layer"):
        run_config(offload="weights")


def test_an_optimizer_that_mixes_parameters_is_refused():
    tx = optax.chain(optax.clip_by_global_norm(1.0), ng.galore_adamw(1e-2, rank=4))
    with pytest.raises(ConfigError, match=r"--per-layer with .*depends on"):
        train(run_config(per_layer=True), splits=splits(), tx=tx)
