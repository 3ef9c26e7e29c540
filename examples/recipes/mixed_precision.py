"""Mixed precision: bfloat16 weights and gradients in the model, a float32 master copy to update."""

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng


def loss_fn(params, x, y):
    predicted = jax.nn.gelu(x @ params["up"]) @ params["down"]
    # Sums over many numbers belong in float32.
    return jnp.mean((predicted.astype(jnp.float32) - y) ** 2)


def main():
    x = jax.random.normal(jax.random.key(0), (128, 16))
    y = jnp.roll(x, 1, axis=-1)
    keys = jax.random.split(jax.random.key(1))
    master = {
        "up": jax.random.normal(keys[0], (16, 64)) / 4,
        "down": jax.random.normal(keys[1], (64, 16)) / 8,
    }
    # The state has the dtype of the master copy, unless bases and first moments are told otherwise.
    adam = optax.scale_by_adam(mu_dtype=jnp.bfloat16, nesterov=True)
    tx = ng.chain(
        ng.low_rank_project(rank=4, update_interval=10, basis_dtype=jnp.bfloat16),
        ng.compact_natural_gradient(adam, cautious=True),
        ng.project_back(residual="fisher"),
        optax.scale_by_learning_rate(1e-3),
    )

    @jax.jit
    def train_step(master, state):
        weights = optax.tree.cast(master, jnp.bfloat16)
        loss, grads = jax.value_and_grad(loss_fn)(weights, x.astype(jnp.bfloat16), y)
        updates, state = tx.update(optax.tree.cast(grads, jnp.float32), state, master)
        return optax.apply_updates(master, updates), state, loss

    state, losses = tx.init(master), []
    for _ in range(40):
        master, state, loss = train_step(master, state)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; master copy in {master['up'].dtype}")
    return losses, master, state


if __name__ == "__main__":
    main()
