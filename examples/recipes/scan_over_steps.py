"""Many steps in one call: `jax.lax.scan` over batches, for small models and fast devices."""

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng

tx = ng.natural_galore_adamw(
    optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 40), rank=4, update_interval=10
)


def loss_fn(params, x):
    predicted = jax.nn.gelu(x @ params["up"]) @ params["down"]
    return jnp.mean((predicted - jnp.roll(x, 1, axis=-1)) ** 2)


def step(carry, batch):
    params, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss


@jax.jit
def train(params, state, batches):
    """batches: (steps, rows, ...)."""
    (params, state), losses = jax.lax.scan(step, (params, state), batches)
    return params, state, losses


def main():
    keys = jax.random.split(jax.random.key(1))
    params = {
        "up": jax.random.normal(keys[0], (16, 64)) / 4,
        "down": jax.random.normal(keys[1], (64, 16)) / 8,
    }
    state, losses = tx.init(params), []
    for call in range(2):  # Log, save and evaluate between the calls.
        batches = jax.random.normal(jax.random.key(2 + call), (20, 128, 16))
        params, state, of_call = train(params, state, batches)
        losses += of_call.tolist()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps of 2 calls")
    return losses, params, state


if __name__ == "__main__":
    main()
