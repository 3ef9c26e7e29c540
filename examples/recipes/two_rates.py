"""AdamW with two learning rates, one for hidden matrices and eight times it for all others.

A single rate for all parameters has to be low enough for the hidden matrices, and is then too low
for embedding and head. `optax.partition` gives each group an optimizer of its own, any optimizer.
"""

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng

VOCABULARY, WIDTH = 32, 16


def init(key):
    keys = jax.random.split(key, 4)
    return {
        "embed": {"embedding": 0.02 * jax.random.normal(keys[0], (VOCABULARY, WIDTH))},
        "up": {"kernel": jax.random.normal(keys[1], (WIDTH, 64)) / 4, "bias": jnp.zeros(64)},
        "down": {"kernel": jax.random.normal(keys[2], (64, WIDTH)) / 8, "bias": jnp.zeros(WIDTH)},
        "head": {"kernel": 0.02 * jax.random.normal(keys[3], (WIDTH, VOCABULARY))},
    }


def apply(params, tokens):
    x = params["embed"]["embedding"][tokens]
    hidden = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return (x + hidden @ params["down"]["kernel"] + params["down"]["bias"]) @ params["head"][
        "kernel"
    ]


def label(params):
    return jax.tree.map_with_path(
        lambda path, leaf: "hidden" if ng.hidden_matrices(path, leaf) else "unprojected", params
    )


def adamw_with_two_rates(rate, ratio=8.0):
    return optax.partition(
        {
            "hidden": optax.adamw(rate, weight_decay=0.0),
            "unprojected": optax.adamw(ratio * rate, weight_decay=0.0),
        },
        label,
    )


def train(tx):
    tokens = jnp.arange(VOCABULARY)
    following = (5 * tokens + 3) % VOCABULARY

    @jax.jit
    def train_step(params, state):
        def loss_fn(params):
            logits = apply(params, tokens)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, following).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = init(jax.random.key(0))
    state, losses = tx.init(params), []
    for _ in range(50):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    return losses, params, state


def main():
    results = {
        "AdamW, one rate": train(optax.adamw(2.5e-3, weight_decay=0.0)),
        "AdamW, two rates": train(adamw_with_two_rates(2.5e-3)),
        # The same two rates with the hidden matrices in a subspace: the ratio is an argument.
        "Natural GaLore": train(
            ng.natural_galore_adamw(2.5e-3, rank=4, unprojected_ratio=8.0, weight_decay=0.0)
        ),
    }
    for name, (losses, _, _) in results.items():
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return results


if __name__ == "__main__":
    main()
