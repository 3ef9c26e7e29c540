"""The pages of examples/many_devices give the losses of one device, at a tiny size."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.llama.model.config import ModelConfig
from examples.many_devices import replicated, sharded, small_llama

pytestmark = pytest.mark.usefixtures("fast_compile")

MODEL = ModelConfig(
    vocab_size=48,
    hidden=16,
    intermediate=24,
    layers=2,
    heads=2,
    kv_heads=1,
    max_length=8,
    stacked=True,
)
SIZES = {"model": MODEL, "rank": 4}
STEPS = 6

# A mean over a batch is summed in another order, in float32 of 24 bits, and Adam divides by its
# second moments, which makes much of little differences where they are small.
TOLERANCE = 1e-4


def batches():
    rows = np.random.default_rng(0).integers(0, MODEL.vocab_size, (4, 8, MODEL.max_length + 1))
    return itertools.cycle(rows.astype(np.int32))


@pytest.fixture(scope="module")
def on_one_device(fast_compile):
    tx = ng.natural_galore_adamw(small_llama.LEARNING_RATE, rank=SIZES["rank"])

    @jax.jit
    def step(params, state, rows):
        loss, grads = jax.value_and_grad(small_llama.mean_loss)(params, rows, MODEL)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = small_llama.initial(jax.random.key(0), MODEL)
    state, losses = tx.init(params), []
    for rows in itertools.islice(batches(), STEPS):
        params, state, loss = step(params, state, rows)
        losses.append(float(loss))
    # So that a step that leaves the weights as they were cannot pass.
    assert max(losses) - min(losses) > 100 * TOLERANCE * max(losses)
    return losses


def test_replicated(on_one_device):
    losses = replicated.train(jax.devices(), batches(), STEPS, **SIZES)
    np.testing.assert_allclose(losses, on_one_device, rtol=TOLERANCE)


def test_sharded_and_restored_on_another_mesh(on_one_device, tmp_path):
    losses = sharded.train(jax.devices(), batches(), 3, tmp_path, **SIZES)
    losses += sharded.train(jax.devices()[:4], batches(), STEPS, tmp_path, **SIZES)
    np.testing.assert_allclose(losses, on_one_device, rtol=TOLERANCE)


def test_rows_that_devices_cannot_share_are_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 3)
    monkeypatch.setattr(small_llama, "announce_devices", lambda *_: None)
    for simulated, number in ((None, 3), (0, 0), (-1, -1), (5, 5)):
        message = f"--devices must divide the 16 rows of a batch, got {number}"
        with pytest.raises(ConfigError, match=message):
            small_llama.devices(simulated)


def test_each_device_has_an_eighth():
    """Of the model and of the optimizer as they are on the page, from shapes alone."""
    mesh = jax.sharding.AbstractMesh((8,), ("shard",))
    shapes = jax.eval_shape(lambda: small_llama.initial(jax.random.key(0)))
    tx = ng.natural_galore_adamw(1e-2, rank=small_llama.RANK)
    at = ng.training.longer_side_shardings(shapes, mesh)
    arrays = jax.tree.leaves((shapes, jax.eval_shape(tx.init, shapes)))
    shardings = jax.tree.leaves((at, ng.training.state_shardings(tx, shapes, at)))
    whole = sum(math.prod(x.shape) for x in arrays)
    own = sum(math.prod(s.shard_shape(x.shape)) for x, s in zip(arrays, shardings, strict=True))
    # Norms and their moments are whole on every device.
    named = jax.tree_util.tree_leaves_with_path(shapes)
    vectors = 3 * sum(x.size for path, x in named if "norm" in jax.tree_util.keystr(path))
    assert (whole + 7 * vectors) / 8 <= own < 1.01 * (whole + 7 * vectors) / 8


ARRAY = re.compile(r"f32\[([\d,]*)\]")
COLLECTIVE = re.compile(r"= (.*?) (?:all-\w+|reduce-scatter|collective-permute)(?:-start)?\(")


def test_weights_are_gathered_and_not_activations():
    """The largest array that devices exchange is the largest matrix: 512 rows would be larger."""
    mesh = jax.sharding.Mesh(jax.devices(), ("shard",))
    shapes = jax.eval_shape(lambda: small_llama.initial(jax.random.key(0), MODEL))
    at = ng.training.longer_side_shardings(shapes, mesh)
    rows = jax.ShapeDtypeStruct((64, MODEL.max_length + 1), jnp.int32)
    with jax.set_mesh(mesh):
        gradient = jax.jit(
            jax.grad(lambda params, rows: small_llama.mean_loss(params, rows, MODEL)),
            in_shardings=(at, jax.NamedSharding(mesh, jax.P("shard"))),
            out_shardings=at,
        )
        program = gradient.lower(shapes, rows).compile().as_text()
    exchanged = [
        math.prod(int(n) for n in shape.split(",") if n)
        for line in program.splitlines()
        if (found := COLLECTIVE.search(line))
        for shape in ARRAY.findall(found[1])
    ]
    assert max(exchanged) == MODEL.vocab_size * MODEL.hidden < 512 * MODEL.hidden
    assert MODEL.hidden * MODEL.intermediate in exchanged
