"""Flax NNX with sharding metadata: weights and optimizer state sharded over devices.

On a CPU: JAX_NUM_CPU_DEVICES=8 NPROC=32 python examples/recipes/flax_nnx_sharded.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType

import natgalore_jax as ng


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        columns = nnx.with_partitioning(init, (None, "model"))
        rows = nnx.with_partitioning(init, ("model", None))
        self.up = nnx.Linear(16, 64, use_bias=False, kernel_init=columns, rngs=rngs)
        self.down = nnx.Linear(64, 16, use_bias=False, kernel_init=rows, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


def main():
    # Auto: the compiler decides where what lies between the weights is.
    mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        graphdef, params = nnx.split(MLP(nnx.Rngs(0)), nnx.Param)
        # Optax on the arrays alone. nnx.Optimizer would copy the metadata of each parameter onto
        # its state, whose arrays have other shapes: wrap tx in ng.training.for_nnx for it.
        params = nnx.as_pure(params)
        tx = ng.natural_galore_adamw(1e-2, rank=4, update_interval=10)
        state = tx.init(params)

        @jax.jit
        def train_step(params, state, x, y):
            def loss_fn(params):
                return jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2)

            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        x = jax.random.normal(jax.random.key(0), (128, 16))
        losses = []
        for _ in range(20):
            params, state, loss = train_step(params, state, x, jnp.roll(x, 1, axis=-1))
            losses.append(float(loss))
    mu = optax.tree.get(state, "mu")["up"]["kernel"]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; moments {mu.shape}, {mu.sharding.spec}")
    return losses, params, state


if __name__ == "__main__":
    main()
