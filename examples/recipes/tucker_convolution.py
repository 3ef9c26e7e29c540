"""Convolution kernels as tensors (Tucker): a subspace, and a rank, for each of their axes."""

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng

# A kernel is (height, width, inputs, outputs); at rank 3 the small axes are kept whole. A tuple is
# for tensors, so that matrices need an optimizer of their own: here AdamW, or one with rank=4.
tx = optax.partition(
    {
        "kernels": ng.natural_galore_adamw(1e-2, rank=(3, 3, 4, 4), update_interval=10),
        "others": optax.adamw(1e-2),
    },
    lambda params: jax.tree.map(lambda p: "kernels" if p.ndim == 4 else "others", params),
)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def apply(params, x):
    return jax.nn.relu(conv(x, params["conv"]) + params["bias"]) @ params["mix"]


def main():
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 8))
    y = jnp.roll(x, 1, axis=2)  # Each picture a pixel to the right.
    keys = jax.random.split(jax.random.key(1))
    params = {
        "conv": jax.random.normal(keys[0], (3, 3, 8, 16)) / 9,
        "bias": jnp.zeros(16),
        "mix": jax.random.normal(keys[1], (16, 8)) / 4,
    }

    @jax.jit
    def train_step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(ng.memory_report(tx, params))
    return losses, params, state


if __name__ == "__main__":
    main()
