"""Flax NNX: `nnx.Optimizer` takes the optimizer as it takes any of Optax."""

import jax
import jax.numpy as jnp
from flax import nnx

import natgalore_jax as ng


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, 64, rngs=rngs)
        self.down = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


def main():
    x = jax.random.normal(jax.random.key(0), (128, 16))
    y = jnp.roll(x, 1, axis=-1)
    model = MLP(nnx.Rngs(0))
    tx = ng.natural_galore_adamw(1e-2, rank=4, update_interval=10)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(train_step(model, optimizer, x, y)) for _ in range(20)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses, model, optimizer


if __name__ == "__main__":
    main()
