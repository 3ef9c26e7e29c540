"""Pre-training on a mesh, on one page: weights, state and batches sharded over devices.

    python -m examples.many_devices.sharded --devices 8             # on a CPU, as if it were eight
    python -m examples.many_devices.sharded --devices 4 --steps 40  # goes on, on four
    python -m examples.many_devices.sharded                         # on all devices

No device ever has all weights, nor all of the optimizer's state. docs/sharding.md has the axes to
shard and the bytes that are sent.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax.sharding import NamedSharding

import natgalore_jax as ng
from examples.common.cli import exit_code
from examples.llama.model.config import ModelConfig
from examples.many_devices import small_llama


def train(
    devices: Sequence[jax.Device],
    batches: Iterator[np.ndarray],
    steps: int,
    directory: Path,
    model: ModelConfig = small_llama.MODEL,
    rank: int = small_llama.RANK,
) -> list[float]:
    """The loss of each step up to `steps`, from the newest checkpoint in `directory` on."""
    tx = ng.natural_galore_adamw(small_llama.LEARNING_RATE, rank=rank)
    mesh = jax.make_mesh((len(devices),), ("shard",), devices=devices)

    def initial(key):
        return small_llama.initial(key, model)

    # Everything has its place before there is an array: each device makes its own parts.
    key = jax.random.key(0)
    shapes = jax.eval_shape(initial, key)
    params_at = ng.training.longer_side_shardings(shapes, mesh)
    state_at = ng.training.state_shardings(tx, shapes, params_at)
    rows_at, everywhere = NamedSharding(mesh, jax.P("shard")), NamedSharding(mesh, jax.P())

    # The optimizer knows where everything is: the axes of `jax.make_mesh` are explicit. The model
    # leaves it to the compiler, which gathers the weights of one layer at a time because the model
    # keeps its activations divided by rows (`by_rows` in examples/common/lora.py).
    def loss(params, rows):
        return small_llama.mean_loss(params, rows, model)

    value_and_grad: Any = jax.sharding.auto_axes(
        jax.value_and_grad(loss), out_sharding=(everywhere, params_at)
    )

    def step(params, state, rows):
        value, grads = value_and_grad(params, rows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    losses = []
    with ocp.CheckpointManager(directory.absolute()) as checkpoints, jax.set_mesh(mesh):
        done = checkpoints.latest_step() or 0
        if done:  # Written by any number of devices.
            like = jax.tree.map(
                lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
                (shapes, jax.eval_shape(tx.init, shapes)),
                (params_at, state_at),
            )
            params, state = checkpoints.restore(done, args=ocp.args.StandardRestore(like))
        else:
            params = jax.jit(initial, out_shardings=params_at)(key)
            state = jax.jit(tx.init, out_shardings=state_at)(params)
        for number, rows in zip(range(steps), batches, strict=False):
            if number < done:
                continue
            rows = jax.make_array_from_process_local_data(rows_at, rows)
            params, state, value = step(params, state, rows)
            losses.append(float(value))
            print(f"step {number + 1:3} loss {losses[-1]:.4f}")
        if losses:
            checkpoints.save(steps, args=ocp.args.StandardSave((params, state)))
    return losses


def main(
    devices: int | None = None, steps: int = 20, directory: Path = Path("runs/many_devices")
) -> int:
    """Trains a small LLaMA on the presidential addresses.

    Args:
      devices: how many to simulate on a CPU; without it, all that there are.
      steps: how many to take, of 16 rows, with those before a checkpoint.
      directory: of the checkpoint, written at the end. A run that finds one goes on from it.
    """
    train(small_llama.devices(devices), small_llama.batches(), steps, directory)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, description=__doc__)))
