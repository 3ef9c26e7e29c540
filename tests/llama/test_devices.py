"""Several devices are one run; with processes see test_distributed.py."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_run as tiny

from examples.common.errors import ConfigError
from examples.llama.distributed.processes import DistributedConfig
from examples.llama.loop import train

pytestmark = pytest.mark.usefixtures("fast_compile")


DEVICES = DistributedConfig(devices=True)
FULL = DistributedConfig(devices=True, sharding="full")
NOT_CLIPPED = dataclasses.replace(tiny.NATURAL_GALORE, clip_norm=None)


@functools.cache
def on_one_device(per_layer):
    config = tiny.run_config(batch_size=8, per_layer=per_layer, optimizer=NOT_CLIPPED)
    return train(config, splits=tiny.splits())


def test_updates_per_layer_are_the_same_run():
    tiny.assert_same_run(on_one_device(True), on_one_device(False))


@pytest.mark.parametrize("sharding", ["replicated", "full"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_devices_share_a_run(tmp_path, per_layer, sharding):
    """Its losses are those of one device, on which it goes on, and its result is there."""
    alone = on_one_device(per_layer)
    config = alone.config
    shared = dataclasses.replace(config, distributed=FULL if sharding == "full" else DEVICES)
    part = train(shared, splits=tiny.splits(), run_dir=tmp_path, should_stop=tiny.after(4))
    assert not part.finished
    weights = alone.memory.predicted.weights
    if sharding == "full":  # Every side of the tiny model is a multiple of eight; vectors stay.
        named = jax.tree_util.tree_leaves_with_path(alone.state.params)
        whole = sum(x.nbytes for path, x in named if "norm" in jax.tree_util.keystr(path))
        weights = whole + (weights - whole) // 8
    assert part.memory.predicted.weights == weights
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, resume=True))
    result = train(config, splits=tiny.splits(), run_dir=tmp_path)
    assert result.finished
    if sharding == "replicated":
        assert {len(x.devices()) for x in jax.tree.leaves(part.state)} == {1}
    else:
        assert {type(x) for x in jax.tree.leaves(part.state)} == {np.ndarray}
    names = [(r["kind"], r["step"]) for r in alone.records]
    assert [(r["kind"], r["step"]) for r in result.records] == names
    # Sums over a batch in another order, in float32.
    np.testing.assert_allclose(
        [r["loss"] for r in result.records], [r["loss"] for r in alone.records], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "batch_size=12 must be a multiple of the number of devices, 8 of 1"),
        ({"batch_size": 8, "offload": "state"}, "--offload state .* use one of the two"),
        (
            {
                "per_layer": True,
                "weight_bits": 8,
                "optimizer": NOT_CLIPPED,
                "distributed": FULL,
            },
            "--weight-bits makes first weights whole on one device",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny.run_config(**{"distributed": DEVICES, **changes}), splits=tiny.splits())
