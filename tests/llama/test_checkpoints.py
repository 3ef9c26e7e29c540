"""Checkpoints: kept as asked for, and restored on any devices."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import assert_same_bits

from examples.common.checkpoints import Checkpoints, kept, quarantine
from examples.common.errors import CheckpointError
from examples.common.train_state import TrainState, init_state


def some_state(step: int) -> TrainState:
    params = {"layers": {0: jnp.full((2, 3), step, jnp.bfloat16)}, "norm": jnp.arange(3.0)}
    state = init_state(params, optax.adamw(1e-3, mu_dtype=jnp.float32))
    return state._replace(micro_step=jnp.int32(step))


def test_what_is_saved_is_restored(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(some_state(3), {"next_index": 5}, {"rank": 4, "name": None})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3
        assert checkpoints.config() == {"rank": 4, "name": None}
        state, data = checkpoints.restore(some_state(0))
    assert data == {"next_index": 5}
    assert_same_bits(state, some_state(3))


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (("digests.json", "_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA"),
        (("digests.json",), "2/state: is missing$"),
    ],
)
def test_a_copy_that_was_cut_off_is_set_aside(tmp_path, missing, named):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            checkpoints.save(some_state(step), {}, {})
    shutil.rmtree(directory / "2" / "state")
    for name in missing:
        (directory / "2" / name).unlink()
    (found,) = quarantine(directory)
    assert re.search(named, found)
    assert kept(directory) == [1]


def test_an_older_step_is_not_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(some_state(3), {}, {})
        with pytest.raises(CheckpointError, match="micro-step 2 is before that of the newest"):
            checkpoints.save(some_state(2), {}, {})


def test_only_the_last_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(some_state(step), {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_the_best_are_kept_beside_the_last(tmp_path):
    losses = {1: 3.0, 2: None, 3: 1.0, 4: 2.0, 5: None, 6: 5.0, 7: None}
    with Checkpoints(tmp_path, keep=1, keep_best=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(some_state(step), {}, {}, loss=loss)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4", "7"]
    # The losses are in the checkpoints: a run that goes on compares with them.
    with Checkpoints(tmp_path, keep=1, keep_best=2) as checkpoints:
        assert (checkpoints.best(), checkpoints.latest()) == (3, 7)
        checkpoints.save(some_state(8), {}, {}, loss=1.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "8"]


def test_the_training_goes_on_while_it_is_saved(tmp_path):
    """The arrays may be changed in place as soon as `save` returns."""
    started, done = [], []
    with Checkpoints(tmp_path) as checkpoints:
        state = some_state(1)
        checkpoints.save(state, {}, {})
        started = list(tmp_path.glob("*tmp*"))
        jax.tree.map(lambda x: x.delete(), state)
        done = checkpoints.latest()
    assert started
    assert done == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_bits(checkpoints.restore(some_state(0))[0], some_state(1))


def on_devices(number, spec, seed):
    """A state of random bits over so many devices: by `spec` where both axes divide."""
    mesh = jax.make_mesh((number,), ("x",), devices=jax.devices()[:number])
    rng = np.random.default_rng(seed)

    def array(shape, dtype):
        bits = rng.integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
        x = bits.view(dtype).reshape(shape)
        where = spec if len(shape) == 2 and shape[0] % number == 0 else jax.P()
        return jax.device_put(x, jax.NamedSharding(mesh, where))

    key = jax.random.wrap_key_data(array((2,), jnp.uint32))
    params = {"w": array((16, 32), jnp.float32), "b": array((8, 24), jnp.bfloat16)}
    moments = {"w": array((16, 8), jnp.int8), "odd": array((3, 8), jnp.float16), "none": None}
    totals = {"loss": array((), jnp.float32)}
    step = jax.device_put(np.int32(1), jax.NamedSharding(mesh, jax.P()))
    return TrainState(params, (moments, key, optax.EmptyState()), step, totals, {})


def test_what_eight_devices_saved_others_restore(tmp_path):
    """Onto 4, 2 and 1, in other pieces or whole, with every bit, of NaN too."""
    saved = on_devices(8, jax.P("x"), seed=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved, {}, {})
    with Checkpoints(tmp_path) as checkpoints:
        for number, spec in [(4, jax.P("x")), (2, jax.P(None, "x")), (8, jax.P()), (1, jax.P())]:
            like = on_devices(number, spec, seed=1)
            shardings = jax.tree.map(lambda x: x.sharding, like)
            restored, _ = checkpoints.restore(like)
            assert_same_bits(restored, saved)
            assert jax.tree.map(lambda x: x.sharding, restored) == shardings
