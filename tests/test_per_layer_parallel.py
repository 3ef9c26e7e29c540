"""Per-layer updates of sharded parameters: the numbers of one device."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from per_layer_model import LOW, batches, embed, head, init_params, layer, ordinary, per_layer
from tolerances import LOSSES

import natgalore_jax as ng

STEPS = 4
OPTIMIZER = ng.natural_galore_adamw(**LOW)
pytestmark = pytest.mark.usefixtures("fast_compile")


@functools.cache
def on_one_device(weight_bits):
    if weight_bits == 8:
        return per_layer(OPTIMIZER, ng.training.quantize_weights(init_params()), batches(STEPS))[0]
    return ordinary(OPTIMIZER, init_params(), batches(STEPS))[0]


@pytest.mark.parametrize(
    "axis_type,weight_bits",
    [(AxisType.Explicit, 32), (AxisType.Auto, 8)],
)
def test_sharded_parameters(axis_type, weight_bits):
    """Four devices, each with a part of the rows or columns of every matrix in the layers."""
    params = init_params()

    def gathered(w, x):
        """On explicit meshes a model has to say how it computes with sharded weights."""
        if axis_type == AxisType.Explicit:
            w = jax.tree.map(lambda a: jax.sharding.reshard(a, jax.P()), w)
        return layer(w, x)

    mesh = jax.make_mesh((4,), ("model",), axis_types=(axis_type,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        for name, spec in ("up", jax.P(None, None, "model")), ("down", jax.P(None, "model", None)):
            sharding = jax.NamedSharding(mesh, spec)
            params["layers"][name] = jax.device_put(params["layers"][name], sharding)
        if weight_bits == 8:
            params = jax.jit(ng.training.quantize_weights)(params)
        train = ng.training.per_layer(OPTIMIZER, embed, gathered, head)
        state = jax.jit(train.init)(params)
        for batch, expected in zip(batches(STEPS), on_one_device(weight_bits), strict=True):
            params, state, metrics = train.step(params, state, batch)
            np.testing.assert_allclose(metrics.loss, expected, **LOSSES)
    weights = params.codes if weight_bits == 8 else params
    assert weights["layers"]["up"].sharding.spec == jax.P(None, None, "model")
