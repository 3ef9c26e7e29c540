"""Equinox: the optimizer is given the model's arrays, `eqx.filter(model, eqx.is_inexact_array)`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng


@eqx.filter_value_and_grad
def loss_and_grads(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


@eqx.filter_jit
def train_step(model, state, tx, x, y):
    loss, grads = loss_and_grads(model, x, y)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


def main():
    x = jax.random.normal(jax.random.key(0), (128, 16))
    y = jnp.roll(x, 1, axis=-1)
    model = eqx.nn.MLP(
        16, 16, width_size=64, depth=1, activation=jax.nn.gelu, key=jax.random.key(1)
    )
    tx = ng.natural_galore_adamw(1e-2, rank=4, update_interval=10)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    losses = []
    for _ in range(20):
        model, state, loss = train_step(model, state, tx, x, y)
        losses.append(float(loss))
    moments = optax.tree.get(state, "mu").layers[0].weight
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; moments of the first layer {moments.shape}")
    return losses, model, state


if __name__ == "__main__":
    main()
