"""Parameters in plain nested dicts, as Haiku has them: `{"module": {"w": ..., "b": ...}}`."""

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng


def init(key):
    keys = jax.random.split(key)
    return {
        "mlp/~/linear_0": {"w": jax.random.normal(keys[0], (16, 64)) / 4, "b": jnp.zeros(64)},
        "mlp/~/linear_1": {"w": jax.random.normal(keys[1], (64, 16)) / 8, "b": jnp.zeros(16)},
    }


def apply(params, x):
    first, second = params["mlp/~/linear_0"], params["mlp/~/linear_1"]
    return jax.nn.gelu(x @ first["w"] + first["b"]) @ second["w"] + second["b"]


def main():
    x = jax.random.normal(jax.random.key(0), (128, 16))
    y = jnp.roll(x, 1, axis=-1)
    tx = ng.natural_galore_adamw(1e-2, rank=4, update_interval=10)

    @jax.jit
    def train_step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = init(jax.random.key(1))
    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(ng.memory_report(tx, params))
    return losses, params, state


if __name__ == "__main__":
    main()
