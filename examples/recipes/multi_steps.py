"""Gradient accumulation with `optax.MultiSteps`: around the optimizer, and inside the subspace."""

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng

K = 4  # micro-batches of one update

# Around any optimizer: the accumulator has the size of the parameters.
around = optax.MultiSteps(ng.natural_galore_adamw(1e-2, rank=4, update_interval=5), K)

# Inside: the accumulator is as small as the moments. A basis then comes from a single micro-batch,
# and bases change between two updates only: the interval is a multiple of K.
inside = ng.chain(
    ng.low_rank_project(rank=4, update_interval=5 * K),
    optax.MultiSteps(optax.scale_by_adam(), K),
    ng.project_back(),
    optax.scale_by_learning_rate(1e-2),
)


def train(tx, params, x, y):
    def loss_fn(params, x, y):
        return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)

    @jax.jit
    def train_step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)  # zero but for every K-th call
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(15):
        for rows in zip(jnp.split(x, K), jnp.split(y, K), strict=True):
            params, state, loss = train_step(params, state, *rows)
            losses.append(float(loss))
    return losses, params, state


def main():
    x = jax.random.normal(jax.random.key(0), (128, 16))
    keys = jax.random.split(jax.random.key(1))
    params = {
        "up": jax.random.normal(keys[0], (16, 64)) / 4,
        "down": jax.random.normal(keys[1], (64, 16)) / 8,
    }
    results = {}
    for name, tx in {"around": around, "inside": inside}.items():
        losses, _, state = results[name] = train(tx, params, x, jnp.roll(x, 1, axis=-1))
        sizes = sum(a.size for a in jax.tree.leaves(optax.tree.get(state, "acc_grads")))
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {sizes} numbers accumulate")
    return results


if __name__ == "__main__":
    main()
