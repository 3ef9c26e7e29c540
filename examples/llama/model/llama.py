"""LLaMA in Flax NNX.

Arrays are named and commented by their axes: B rows, T tokens, D hidden, N heads, K heads of keys
and values, H numbers in a head, V vocabulary, L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import natgalore_jax as ng
from examples.common.lora import Linear
from examples.llama.model.config import ModelConfig

INIT_STD = 0.02
_INIT = nnx.initializers.normal(INIT_STD)


def dense(inputs: int, outputs: int, config: ModelConfig, rngs: nnx.Rngs) -> Linear:
    """A linear map without a bias."""
    return Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=_INIT,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


# (inputs, outputs, config, rngs) to a module from (..., inputs) to (..., outputs).
MakeLinear = Callable[[int, int, ModelConfig, nnx.Rngs], nnx.Module]


class Llama(nnx.Module):
    """Tokens (B, T) int32 to logits (B, T, V) float32.

    Parameters: ``embed.embedding (V, D)``, ``layers.<i>.attention.{q,k,v,o}.kernel (in, out)``,
    ``layers.<i>.mlp.{gate,up,down}.kernel (in, out)``,
    ``layers.<i>.{attention_norm,mlp_norm}.scale (D,)``, ``norm.scale (D,)`` and, unless the
    embeddings are tied, ``head.kernel (D, V)``. With ``config.stacked`` the ``<i>`` is not there
    and every parameter of ``layers`` has a leading axis L. ``make_linear`` may put something else
    instead of the linear maps of the layers.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, make_linear: MakeLinear = dense):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden,
            embedding_init=_INIT,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        if config.stacked:
            make = nnx.vmap(lambda rngs: Layer(config, make_linear, rngs=rngs))
            self.layers = make(rngs.split(config.layers))
        else:
            layers = (Layer(config, make_linear, rngs=rngs) for _ in range(config.layers))
            self.layers = nnx.List(layers)
        self.norm = _norm(config, rngs)
        if not config.tied_embeddings:
            self.head = dense(config.hidden, config.vocab_size, config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[-1]
        if length > self.config.max_length:
            raise ValueError(f"rows of {length} tokens, max_length={self.config.max_length}")
        x = self.embed(tokens)
        x = self.run_layers(x, jnp.arange(length))
        return self.logits(x)

    def run_layers(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """All layers: x (B, T, D) to (B, T, D)."""

        # The transformations of JAX itself: modules are pytrees, and those of NNX refuse a model
        # that was merged outside of a loop that it runs in.
        def run(x, layer):
            return ng.training.to_device(layer)(x, positions), None

        if self.config.remat:
            run = jax.checkpoint(run, prevent_cse=not self.config.stacked)
        if isinstance(self.layers, Layer):
            return jax.lax.scan(run, x, self.layers)[0]
        for layer in self.layers:
            x, _ = run(x, layer)
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """The last norm and the output head: x (B, T, D) to (B, T, V) in float32."""
        x = self.norm(x)
        head = self.embed.embedding[...].T if self.config.tied_embeddings else self.head.kernel[...]
        dtype = jnp.dtype(self.config.dtype)
        rows = x.reshape(-1, x.shape[-1]).astype(dtype)
        logits = jnp.matmul(rows, head.astype(dtype), preferred_element_type=jnp.float32)
        return logits.reshape(*x.shape[:-1], -1)


class Layer(nnx.Module):
    """Attention and feed-forward network, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, make_linear: MakeLinear, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, make_linear, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = MLP(config, make_linear, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nnx.Module):
    """Causal attention with rotary positions and grouped queries."""

    def __init__(self, config: ModelConfig, make_linear: MakeLinear, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        kv_width = config.kv_heads * config.head_dim
        self.q = make_linear(config.hidden, config.hidden, config, rngs)
        self.k = make_linear(config.hidden, kv_width, config, rngs)
        self.v = make_linear(config.hidden, kv_width, config, rngs)
        self.o = make_linear(config.hidden, config.hidden, config, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        q, k, v = self.project(x, positions)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        return self.output(attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), causal))

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries (B, T, N, H), keys and values (B, T, K, H) of x (B, T, D)."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = apply_rope(self.q(x).reshape(heads), positions, self.rope_theta)
        k = apply_rope(self.k(x).reshape(heads), positions, self.rope_theta)
        return q, k, self.v(x).reshape(heads)

    def output(self, mixed: jax.Array) -> jax.Array:
        """Attention output (B, T, N, H) to (B, T, D)."""
        return self.o(mixed.reshape(*mixed.shape[:-2], -1))


class MLP(nnx.Module):
    """SwiGLU: a gated feed-forward network."""

    def __init__(self, config: ModelConfig, make_linear: MakeLinear, *, rngs: nnx.Rngs):
        self.gate = make_linear(config.hidden, config.intermediate, config, rngs)
        self.up = make_linear(config.hidden, config.intermediate, config, rngs)
        self.down = make_linear(config.intermediate, config.hidden, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention of q (B, T, N, H) to k and v (B, K, S, H), where it may see them: (B, T, N, H).

    Equal to `jax.nn.dot_product_attention`. Forward and backward take half of its time on a CPU,
    because heads are moved to the front before the products and not within them.

    Args:
      q, k, v: queries, keys and values; the queries of N / K heads share keys and values.
      visible: (T, S) or (B, T, S) bool.
    """
    rows, length, heads, size = q.shape
    groups, slots = k.shape[1:3]
    # The heads of a group share keys: their queries are rows of one product.
    q = q.reshape(rows, length, groups, -1, size).transpose(0, 2, 3, 1, 4)  # (B, K, N / K, T, H)
    q = q.reshape(rows, groups, -1, size)
    scores = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, groups, -1, length, slots) / size**0.5
    scores = jnp.where(visible[..., None, None, :, :], scores, -1e30)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    mixed = weights.reshape(rows, groups, -1, slots) @ v
    mixed = mixed.reshape(rows, groups, -1, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, length, heads, size)


def apply_rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotate the pairs (x[i], x[i + H/2]) of x (B, T, N, H) by position · theta^(-2i/H).

    Positions are (T,), or (B, T) where they differ from row to row.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None] * frequencies  # (T, 1, H/2) or (B, T, 1, H/2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x.dtype)


def with_params(
    config: ModelConfig, params: dict[str, Any], make_linear: MakeLinear = dense
) -> Llama:
    """The model that has these parameters, a pure dict; nothing is initialised."""
    return nnx.merge(nnx.graphdef(abstract_model(config, make_linear)), params)


def abstract_model(config: ModelConfig, make_linear: MakeLinear = dense) -> Llama:
    """The model without values."""
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), make_linear=make_linear))


def abstract_params(config: ModelConfig, make_linear: MakeLinear = dense) -> dict[str, Any]:
    """Shapes and dtypes of all parameters, a pure dict."""
    return nnx.to_pure_dict(nnx.state(abstract_model(config, make_linear), nnx.Param))


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a stacked model, as a pure dict, in the layout of one that is not stacked."""
    count = len(jax.tree.leaves(params["layers"])[0])
    layers = {i: jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)}
    return {**params, "layers": layers}


def _norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden,
        epsilon=config.norm_eps,
        dtype=jnp.float32,
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )
