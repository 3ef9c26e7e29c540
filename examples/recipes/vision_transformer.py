"""A vision transformer: attention kernels of three axes are matrices, by `axes`."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import natgalore_jax as ng


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
    """Pictures (B, 8, 8, 3) to logits (B, classes)."""

    def __init__(self, width: int, heads: int, classes: int, rngs: nnx.Rngs):
        # Names decide: what is called embed... or head is not projected, as with language models.
        self.patch_embed = nnx.Conv(3, width, (4, 4), strides=4, rngs=rngs)
        self.position_embed = nnx.Param(jnp.zeros((4, width)))
        self.block = Block(width, heads, rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patch_embed(x).reshape(len(x), 4, -1) + self.position_embed[...]
        return self.head(self.block(x).mean(axis=1))


def axes(params):
    """Queries, keys, values (width, heads, head_dim); the way out (heads, head_dim, width)."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim != 3:
            return None
        into, out = ng.MatrixAxes(rows=0, cols=(1, 2)), ng.MatrixAxes(rows=(0, 1), cols=2)
        return out if "attention/out" in name else into

    return jax.tree.map_with_path(of, params)


def main():
    x = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    y = (x.mean(axis=(1, 2)).argmax(-1)).astype(int)  # Which colour is the strongest?
    graphdef, params = nnx.split(ViT(width=16, heads=2, classes=3, rngs=nnx.Rngs(0)), nnx.Param)
    params = nnx.as_pure(params)
    tx = ng.natural_galore_adamw(1e-2, rank=4, update_interval=10, axes=axes)

    @jax.jit
    def train_step(params, state):
        def loss_fn(params):
            logits = nnx.merge(graphdef, params)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(25):
        params, state, loss = train_step(params, state)
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(ng.memory_report(tx, params))
    return losses, params, state


if __name__ == "__main__":
    main()
