"""Checkpoints survive being cut off."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run as tiny

from examples.llama.checkpoints import Checkpoints
from examples.llama.loop import train
from examples.llama.train_step import TrainState, init_state

# A run that saves at every step, resumed where it was left.
CHILD = """
import sys, pathlib
import tiny_run as tiny
from examples.llama.loop import train
config = tiny.run_config(steps=40, output={"save_every": 1, "resume": True})
train(config, splits=tiny.splits(), run_dir=pathlib.Path(sys.argv[1]))
"""


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
    expected = some_state(3)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_only_the_last_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(some_state(step), {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def unfinished(directory: Path) -> list[Path]:
    return list(directory.glob("*.orbax-checkpoint-tmp*"))


def kill_during_save(run_dir: Path) -> None:
    """Starts the child and kills it when it is saving and has saved before."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run_dir)], env={**os.environ, "PYTHONPATH": path}
    )
    directory = run_dir / "checkpoints"
    while child.poll() is None:
        if unfinished(directory) and any(p.name.isdigit() for p in directory.iterdir()):
            child.send_signal(signal.SIGKILL)
            child.wait()
            return
        time.sleep(0.001)
    pytest.fail(f"the run ended with {child.returncode} before it could be killed")


@pytest.mark.usefixtures("fast_compile")
def test_killed_during_a_save_it_resumes_from_the_last_complete_checkpoint(tmp_path):
    for _ in range(5):
        kill_during_save(tmp_path)
        # Between seeing the save and killing it, the save may have been completed.
        if unfinished(tmp_path / "checkpoints"):
            break
    else:
        pytest.fail("no kill hit a save")

    config = tiny.run_config(steps=40, output={"save_every": 1})
    resumed = dataclasses.replace(config, output=dataclasses.replace(config.output, resume=True))
    result = train(resumed, splits=tiny.splits(), run_dir=tmp_path)

    whole = train(config, splits=tiny.splits())
    assert result.finished
    for a, b in zip(jax.tree.leaves(result.state), jax.tree.leaves(whole.state), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    losses = [[(r["kind"], r["step"], r["loss"]) for r in x.records] for x in (result, whole)]
    assert losses[0] == losses[1]
    assert not unfinished(tmp_path / "checkpoints")
