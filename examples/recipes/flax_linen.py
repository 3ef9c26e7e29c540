"""Flax Linen: `TrainState` takes the optimizer as it takes any of Optax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState

import natgalore_jax as ng


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16)(nn.gelu(nn.Dense(64)(x)))


@jax.jit
def train_step(state, x, y):
    def loss_fn(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main():
    x = jax.random.normal(jax.random.key(0), (128, 16))
    y = jnp.roll(x, 1, axis=-1)
    model = MLP()
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(1), x)["params"],
        tx=ng.natural_galore_adamw(1e-2, rank=4, update_interval=10),
    )
    losses = []
    for _ in range(20):
        state, loss = train_step(state, x, y)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} after {int(state.step)} steps")
    return losses, state.params, state.opt_state


if __name__ == "__main__":
    main()
