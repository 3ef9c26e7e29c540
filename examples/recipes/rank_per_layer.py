"""A rank for each kind of layer, with `optax.partition`."""

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng


def group_of(path, leaf):
    """The name of the optimizer of one parameter."""
    if leaf.ndim < 2:
        return "vectors"
    return "wide" if "up" in jax.tree_util.keystr(path) else "narrow"


tx = optax.partition(
    {
        "wide": ng.natural_galore_adamw(1e-2, rank=8, update_interval=10),
        "narrow": ng.natural_galore_adamw(1e-2, rank=2, update_interval=20, side="long"),
        "vectors": optax.adamw(1e-2),
    },
    lambda params: jax.tree.map_with_path(group_of, params),
)


def apply(params, x):
    for layer in params["layers"]:
        x = x + jax.nn.gelu(x @ layer["up"] + layer["bias"]) @ layer["down"]
    return x


def main():
    x = jax.random.normal(jax.random.key(0), (128, 16))
    y = jnp.roll(x, 1, axis=-1)
    keys = jax.random.split(jax.random.key(1), (2, 2))
    layers = [
        {
            "up": jax.random.normal(up, (16, 64)) / 4,
            "bias": jnp.zeros(64),
            "down": jax.random.normal(down, (64, 16)) / 16,
        }
        for up, down in keys
    ]

    @jax.jit
    def train_step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = {"layers": layers}
    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(ng.memory_report(tx, params))
    return losses, params, state


if __name__ == "__main__":
    main()
