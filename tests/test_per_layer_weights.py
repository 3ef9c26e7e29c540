"""Per-layer training of weights in 8 bits: against a loop that decodes, updates and rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from oracles import weight_codes as oracle
from per_layer_model import LOW, batches, embed, head, init_params, layer, loss, ordinary

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

STEPS = 6
WHERE = {
    "embed": True,
    "layers": {"up": True, "down": True, "norm": False},
    "norm": False,
    "head": True,
}
# Axis and size of the blocks of what is in 8 bits.
BLOCKS = {
    "embed/table": (0, 16),
    "head/kernel": (1, 16),
    "layers/down": (1, 20),
    "layers/up": (2, 20),
}
TX = ng.natural_galore_adamw(**LOW)


def run(train, weights, state, batch_list):
    losses = []
    for batch in batch_list:
        weights, state, metrics = train.step(weights, state, batch)
        losses.append(float(metrics.loss))
    return weights, state, losses


@functools.cache
def trained():
    train = ng.training.per_layer(TX, embed, layer, head)
    weights = ng.training.quantize_weights(init_params(), WHERE)
    return run(train, weights, train.init(weights), batches(STEPS))


def test_equals_a_loop_that_decodes_updates_and_rounds():
    weights = jax.tree.map(np.asarray, ng.training.quantize_weights(init_params(), WHERE))
    codes, scales = weights.codes, weights.scales
    state = TX.init(init_params())

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    paths, treedef = jax.tree_util.tree_flatten_with_path(codes)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    assert {name for name, (_, c) in zip(names, paths, strict=True) if c.dtype == np.int8} == set(
        BLOCKS
    )
    for count, batch in enumerate(batches(STEPS)):
        params = ng.training.dequantize_weights(ng.training.QuantizedWeights(count, codes, scales))
        params, state, value = step(params, state, batch)
        losses.append(float(value))
        new = list(map(np.asarray, treedef.flatten_up_to(params)))
        new_scales = treedef.flatten_up_to(scales)
        for i, name in enumerate(names):
            if name in BLOCKS:
                new[i], new_scales[i] = oracle.update(
                    new[i], new_scales[i], *BLOCKS[name], count, i
                )
        codes, scales = treedef.unflatten(new), treedef.unflatten(new_scales)
    actual, _, actual_losses = trained()
    assert int(actual.count) == STEPS
    np.testing.assert_allclose(actual_losses, losses, rtol=1e-4)
    decoded = ng.training.dequantize_weights(ng.training.QuantizedWeights(STEPS, codes, scales))
    for name, a, b in zip(
        names,
        jax.tree.leaves(ng.training.dequantize_weights(actual)),
        jax.tree.leaves(decoded),
        strict=True,
    ):
        # Sums in another order fall on another side of a threshold now and then.
        same = np.abs(a - b) < 1e-4
        assert same.mean() > (0.99 if name in BLOCKS else 1 - 1e-9), (name, same.mean())


def test_the_loss_falls_as_with_floats():
    *_, losses = trained()
    floats, *_ = ordinary(TX, init_params(), batches(STEPS))
    assert floats[-1] < floats[0] - 0.1
    np.testing.assert_allclose(losses, floats, rtol=0.02)


def test_a_restored_run_goes_on_bit_by_bit(tmp_path):
    train = ng.training.per_layer(TX, embed, layer, head)
    weights = ng.training.quantize_weights(init_params(), WHERE)
    weights, state, _ = run(train, weights, train.init(weights), batches(STEPS)[:3])
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave((weights, state)))
        manager.wait_until_finished()
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.eval_shape(lambda p: (p, train.init(p)), weights)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
        )
        restored = manager.restore(3, args=ocp.args.StandardRestore(abstract))
    weights, state, _ = run(train, *restored, batches(STEPS)[3:])
    jax.tree.map(np.testing.assert_array_equal, (weights, state), trained()[:2])


def test_bfloat16_gradients_and_states_of_exact_weights():
    """Types are stable, and what is too small for bfloat16 still moves weights."""
    train = ng.training.per_layer(
        optax.sgd(1e-3), embed, layer, head, weight_dtype=jnp.bfloat16, accumulate=1
    )
    weights = ng.training.quantize_weights(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params()), WHERE
    )
    state = train.init(weights)
    before = jax.tree.map(np.asarray, weights)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (weights, state))
    for batch in batches(20):
        weights, state, _ = train.step(weights, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (weights, state)) == shapes
    moved = np.mean(np.asarray(weights.codes["head"]["kernel"]) != before.codes["head"]["kernel"])
    assert 0 < moved < 0.5


def test_an_accumulation_leaves_weights_alone_until_its_step():
    tx = ng.galore_adamw(**LOW)
    train = ng.training.per_layer(tx, embed, layer, head, accumulate=2)
    weights = ng.training.quantize_weights(init_params(), WHERE)
    codes = jax.tree.map(np.asarray, weights.codes)
    state = train.init(weights)
    for number, batch in enumerate(batches(2)):
        weights, state, _ = train.step(weights, state, batch)
        same = jax.tree.map(lambda a, b: bool(np.all(a == b)), weights.codes, codes)
        assert all(jax.tree.leaves(same)) == (number == 0)
