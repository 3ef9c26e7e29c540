"""Pre-training with `jax.pmap`, on one page: every device has all weights and the whole state.

    python -m examples.many_devices.replicated               # on all devices
    python -m examples.many_devices.replicated --devices 8   # on a CPU, as if it were eight

Each device takes its rows of a batch. The gradients are averaged, so that every device takes the
same step; the optimizer is unchanged.
"""

import functools
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import natgalore_jax as ng
from examples.common.cli import exit_code
from examples.llama.model.config import ModelConfig
from examples.many_devices import small_llama


def train(
    devices: Sequence[jax.Device],
    batches: Iterator[np.ndarray],
    steps: int,
    model: ModelConfig = small_llama.MODEL,
    rank: int = small_llama.RANK,
) -> list[float]:
    """The loss of each step."""
    tx = ng.natural_galore_adamw(small_llama.LEARNING_RATE, rank=rank)

    @functools.partial(jax.pmap, axis_name="data", devices=devices, donate_argnums=(0, 1))
    def step(params, state, rows):
        loss, grads = jax.value_and_grad(small_llama.mean_loss)(params, rows, model)
        # Before the optimizer: bases are made from the mean gradient, and stay the same on all.
        loss, grads = jax.lax.pmean((loss, grads), "data")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = small_llama.initial(jax.random.key(0), model)
    # pmap wants one copy for each device, on the first axis.
    params, state = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (len(devices), *x.shape)), (params, tx.init(params))
    )
    losses = []
    for _ in range(steps):
        rows = next(batches)
        params, state, loss = step(params, state, rows.reshape(len(devices), -1, rows.shape[-1]))
        losses.append(float(loss[0]))
        print(f"step {len(losses):3} loss {losses[-1]:.4f}")
    return losses


def main(devices: int | None = None, steps: int = 20) -> int:
    """Trains a small LLaMA on the presidential addresses.

    Args:
      devices: how many to simulate on a CPU; without it, all that there are.
      steps: how many to take, of 16 rows.
    """
    train(small_llama.devices(devices), small_llama.batches(), steps)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, description=__doc__)))
