"""A diffusion-like U-Net: convolution kernels as long matrices, by `axes`."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import natgalore_jax as ng


class UNet(nnx.Module):
    """Noisy pictures (B, 8, 8, C) and noise levels (B,) to the noise."""

    def __init__(self, channels: int, width: int, rngs: nnx.Rngs):
        self.time = nnx.Linear(2, 2 * width, rngs=rngs)
        self.enter = nnx.Conv(channels, width, (3, 3), rngs=rngs)
        self.down = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs)
        self.middle = nnx.Conv(2 * width, 2 * width, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(2 * width, width, (2, 2), strides=2, rngs=rngs)
        self.leave = nnx.Conv(2 * width, channels, (3, 3), rngs=rngs)

    def __call__(self, x, t):
        time = self.time(jnp.stack([jnp.sin(3 * t), jnp.cos(3 * t)], axis=-1))[:, None, None]
        high = jax.nn.silu(self.enter(x))
        low = jax.nn.silu(self.down(high) + time)
        low = low + jax.nn.silu(self.middle(low))
        return self.leave(jnp.concatenate([high, self.up(low)], axis=-1))


def axes(params):
    """A kernel (height, width, inputs, outputs) is a (height · width · inputs) × outputs matrix."""
    kernel = ng.MatrixAxes(rows=(0, 1, 2), cols=3)
    return jax.tree.map(lambda p: kernel if p.ndim == 4 else None, params)


def main():
    pictures = jax.random.normal(jax.random.key(0), (16, 1, 1, 4)) * jnp.ones((8, 8, 1))
    graphdef, params = nnx.split(UNet(channels=4, width=8, rngs=nnx.Rngs(0)), nnx.Param)
    params = nnx.as_pure(params)
    # Kernels with 8 channels or fewer on a side, and the layer of noise levels, take AdamW steps.
    tx = ng.natural_galore_adamw(1e-2, rank=8, update_interval=10, axes=axes)

    @jax.jit
    def train_step(params, state, key):
        for_t, for_noise = jax.random.split(key)
        t = jax.random.uniform(for_t, (len(pictures),))
        noise, a = jax.random.normal(for_noise, pictures.shape), t[:, None, None, None]

        def loss_fn(params):
            noisy = jnp.sqrt(1 - a) * pictures + jnp.sqrt(a) * noise
            return jnp.mean((nnx.merge(graphdef, params)(noisy, t) - noise) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for key in jax.random.split(jax.random.key(1), 30):
        params, state, loss = train_step(params, state, key)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(ng.memory_report(tx, params))
    return losses, params, state


if __name__ == "__main__":
    main()
