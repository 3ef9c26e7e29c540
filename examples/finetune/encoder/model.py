"""BERT and RoBERTa with a head for sentences, in Flax NNX.

Arrays are named by their axes: B rows, T tokens, D hidden, N heads, H numbers in a head, L layers,
C outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.common.lora import Linear
from examples.finetune.encoder.config import EncoderConfig

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nnx.gelu(x, approximate=False),
    "gelu_new": lambda x: nnx.gelu(x, approximate=True),
    "relu": nnx.relu,
}

# Random numbers for dropout; without them nothing is dropped.
Key = jax.Array | None


class Inputs(NamedTuple):
    """A batch of rows, padded to one length."""

    tokens: Any  # (B, T) int32
    types: Any  # (B, T) int32, which of two sentences a token is of
    mask: Any  # (B, T) bool, False where a row is padded


def dense(inputs: int, outputs: int, config: EncoderConfig, rngs: nnx.Rngs) -> Linear:
    """A linear map with a bias."""
    init = nnx.initializers.normal(config.init_std)
    return Linear(inputs, outputs, kernel_init=init, rngs=rngs)


# (name, inputs, outputs, config, rngs) to a module from (..., inputs) to (..., outputs).
MakeLinear = Callable[[str, int, int, EncoderConfig, nnx.Rngs], nnx.Module]


def all_dense(
    _name: str, inputs: int, outputs: int, config: EncoderConfig, rngs: nnx.Rngs
) -> nnx.Module:
    return dense(inputs, outputs, config, rngs)


class Classifier(nnx.Module):
    """A batch to outputs (B, C).

    Parameters: ``embeddings.{word,position,token_type}.embedding``, ``embeddings.norm``,
    ``layers.attention.{query,key,value,output}``, ``layers.attention_norm``,
    ``layers.mlp.{intermediate,output}``, ``layers.mlp_norm``, ``head.{dense,out}``; linear maps
    have a ``kernel (in, out)`` and a ``bias (out,)``, norms a ``scale`` and a ``bias``. Those of
    ``layers`` have a leading axis L. ``make_linear`` is told the name of a linear map of the layers
    (``attention.query``) and may put something else in its place.
    """

    def __init__(
        self, config: EncoderConfig, *, rngs: nnx.Rngs, make_linear: MakeLinear = all_dense
    ):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        make = nnx.vmap(lambda rngs: Layer(config, make_linear, rngs=rngs))
        self.layers = make(rngs.split(config.layers))
        self.head = Head(config, rngs=rngs)

    def __call__(self, inputs: Inputs, key: Key = None) -> jax.Array:
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        x = self.embeddings(inputs, keys[0])

        def run(x, layer_and_key):
            layer, key = layer_and_key
            return layer(x, inputs.mask, key), None

        layer_keys = None if keys[1] is None else jax.random.split(keys[1], self.config.layers)
        # JAX's own scan: modules are pytrees.
        x, _ = jax.lax.scan(run, x, (self.layers, layer_keys))
        return self.head(x[:, 0], keys[2])


class Embeddings(nnx.Module):
    """Sum of what a token, its position and its sentence have, (B, T, D)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.word = _table(config.vocab_size, config, rngs)
        self.position = _table(config.positions, config, rngs)
        self.token_type = _table(config.token_types, config, rngs)
        self.norm = _norm(config, rngs)

    def __call__(self, inputs: Inputs, key: Key) -> jax.Array:
        x = (
            self.word(inputs.tokens)
            + self.position(positions(self.config, inputs.tokens))
            + self.token_type(inputs.types)
        )
        return drop(self.norm(x), self.config.hidden_dropout, key)


class Layer(nnx.Module):
    """Attention and feed-forward network, each with a residual and then a norm."""

    def __init__(self, config: EncoderConfig, make_linear: MakeLinear, *, rngs: nnx.Rngs):
        self.config = config
        self.attention = Attention(config, make_linear, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.mlp = MLP(config, make_linear, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, key: Key) -> jax.Array:
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        rate = self.config.hidden_dropout
        x = self.attention_norm(x + drop(self.attention(x, mask, keys[0]), rate, keys[1]))
        return self.mlp_norm(x + drop(self.mlp(x), rate, keys[2]))


class Attention(nnx.Module):
    """Every token attends to every one that is not padding."""

    def __init__(self, config: EncoderConfig, make_linear: MakeLinear, *, rngs: nnx.Rngs):
        def make(name: str) -> nnx.Module:
            return make_linear(f"attention.{name}", config.hidden, config.hidden, config, rngs)

        self.config = config
        self.query, self.key, self.value = make("query"), make("key"), make("value")
        self.output = make("output")

    def __call__(self, x: jax.Array, mask: jax.Array, key: Key) -> jax.Array:
        heads = (*x.shape[:-1], self.config.heads, -1)
        q, k, v = (
            jnp.swapaxes(linear(x).reshape(heads), 1, 2)  # (B, N, T, H)
            for linear in (self.query, self.key, self.value)
        )
        scores = q @ jnp.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30))
        weights = drop(weights, self.config.attention_dropout, key)
        return self.output(jnp.swapaxes(weights @ v, 1, 2).reshape(x.shape))


class MLP(nnx.Module):
    """The feed-forward network."""

    def __init__(self, config: EncoderConfig, make_linear: MakeLinear, *, rngs: nnx.Rngs):
        wide = config.intermediate
        self.activation = config.activation
        self.intermediate = make_linear("mlp.intermediate", config.hidden, wide, config, rngs)
        self.output = make_linear("mlp.output", wide, config.hidden, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(_ACTIVATIONS[self.activation](self.intermediate(x)))


class Head(nnx.Module):
    """The first token (B, D) to outputs (B, C).

    BERT calls the first linear map its pooler. RoBERTa drops numbers in front of it as well.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.dense = dense(config.hidden, config.hidden, config, rngs)
        self.out = dense(config.hidden, config.outputs, config, rngs)

    def __call__(self, x: jax.Array, key: Key) -> jax.Array:
        keys = (None,) * 2 if key is None else tuple(jax.random.split(key))
        rate = self.config.head_dropout
        if self.config.architecture == "roberta":
            x = drop(x, rate, keys[0])
        return self.out(drop(jnp.tanh(self.dense(x)), rate, keys[1]))


# (weights, inputs, key) to outputs (B, C).
Apply = Callable[[Any, Inputs, Key], jax.Array]


def make_model(
    config: EncoderConfig, make_linear: MakeLinear = all_dense
) -> tuple[Apply, dict[str, Any]]:
    """The model as a function of its parameters, and their shapes and dtypes."""

    def make():
        # Values are not computed: parameters come from files.
        return Classifier(config, rngs=nnx.Rngs(0), make_linear=make_linear)

    graphdef, state = nnx.split(nnx.eval_shape(make), nnx.Param)

    def apply(weights: Any, inputs: Inputs, key: Key = None) -> jax.Array:
        return nnx.merge(graphdef, weights)(inputs, key)

    return apply, nnx.to_pure_dict(state)


def positions(config: EncoderConfig, tokens: jax.Array) -> jax.Array:
    """Rows of the table of positions, (T,) or (B, T).

    RoBERTa numbers the tokens that are not padding from pad_token + 1 on; padding has pad_token.
    """
    if config.architecture == "bert":
        return jnp.arange(tokens.shape[-1])
    real = (tokens != config.pad_token).astype(jnp.int32)
    return jnp.cumsum(real, axis=-1) * real + config.pad_token


def drop(x: jax.Array, rate: float, key: Key) -> jax.Array:
    """Dropout, where there is a key."""
    return nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)


def _table(rows: int, config: EncoderConfig, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(config.init_std)
    return nnx.Embed(rows, config.hidden, embedding_init=init, rngs=rngs)


def _norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden, epsilon=config.norm_eps, rngs=rngs)
