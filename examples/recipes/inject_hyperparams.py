"""`optax.inject_hyperparams`: numbers that are changed while training runs, without compiling."""

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng


def main():
    x = jax.random.normal(jax.random.key(0), (128, 16))
    y = jnp.roll(x, 1, axis=-1)
    keys = jax.random.split(jax.random.key(1))
    params = {
        "up": jax.random.normal(keys[0], (16, 64)) / 4,
        "down": jax.random.normal(keys[1], (64, 16)) / 8,
    }
    # Arguments that shape the state, such as the rank, must stay Python numbers.
    factory = ng.natural_galore_adamw
    make = optax.inject_hyperparams(factory, static_args=ng.structural_args(factory))
    tx = make(learning_rate=1e-2, rank=4, update_interval=10, weight_decay=0.0)

    @jax.jit
    def train_step(params, state):
        def loss_fn(params):
            return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for step in range(20):
        if step == 10:  # On a plateau, say, or by hand.
            changed = {"learning_rate": jnp.float32(2e-3), "weight_decay": jnp.float32(0.1)}
            state = optax.tree.set(state, **changed)
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[9]:.3f} -> {losses[-1]:.3f}")
    return losses, state, train_step


if __name__ == "__main__":
    main()
