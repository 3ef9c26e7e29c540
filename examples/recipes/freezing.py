"""Fine-tuning with frozen layers: they have no optimizer state, and no gradient is computed."""

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng


def init(key):
    keys = jax.random.split(key, 3)
    return {
        f"layer_{i}": {"kernel": jax.random.normal(k, (32, 32)) / 6, "bias": jnp.zeros(32)}
        for i, k in enumerate(keys)
    }


def apply(params, x):
    for layer in params.values():
        x = x + jax.nn.gelu(x @ layer["kernel"] + layer["bias"])
    return x


def label(path, leaf):
    del leaf
    return "frozen" if path[0].key in ("layer_0", "layer_1") else "trained"


def main():
    x = jax.random.normal(jax.random.key(0), (128, 32))
    y = jnp.roll(x, 1, axis=-1)
    params = init(jax.random.key(1))
    labels = jax.tree.map_with_path(label, params)
    tx = optax.partition(
        {
            "trained": ng.natural_galore_adamw(1e-2, rank=8, update_interval=10),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )

    @jax.jit
    def train_step(params, state):
        def loss_fn(params):
            # XLA then leaves out the whole backward pass of the layers below.
            params = jax.tree.map(
                lambda p, name: jax.lax.stop_gradient(p) if name == "frozen" else p, params, labels
            )
            return jnp.mean((apply(params, x) - y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    numbers = sum(a.size for a in jax.tree.leaves(state))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {numbers} numbers of state")
    return losses, params, state


if __name__ == "__main__":
    main()
