"""A training step that updates each layer as soon as its gradient is computed.

The numbers are those of `make_train_step`, without ever holding the gradients of all layers; so is
the state. The model must be stacked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.common.train_state import Metrics, Params, TrainState, next_state
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import abstract_model
from examples.llama.run_config import RunConfig
from examples.llama.training.train_step import inputs_of, mean_over_targets, nll_of_logits


class LayeredModel(NamedTuple):
    """The model in three parts, for `ng.training.per_layer`."""

    embed: Callable[[Params, jax.Array], jax.Array]  # (params, rows (B, T + 1)) to x (B, T, D).
    layer: Callable[[Params, jax.Array], jax.Array]  # (params of one layer, x) to x.
    head: Callable[[Params, jax.Array, jax.Array], jax.Array]  # (params, x, rows) to the loss.


def layered(config: ModelConfig) -> LayeredModel:
    """The parts of a stacked model without adapters."""
    model = abstract_model(config)
    whole, one_layer = nnx.graphdef(model), nnx.graphdef(model.layers)

    def embed(params: Params, rows: jax.Array) -> jax.Array:
        return nnx.merge(whole, params).embed(inputs_of(rows))

    def layer(params: Params, x: jax.Array) -> jax.Array:
        return nnx.merge(one_layer, params)(x, jnp.arange(x.shape[1]))

    def head(params: Params, x: jax.Array, rows: jax.Array) -> jax.Array:
        return mean_over_targets(nll_of_logits(nnx.merge(whole, params).logits(x), rows), rows)

    return LayeredModel(embed, layer, head)


def make_per_layer_step(
    config: RunConfig, tx: optax.GradientTransformation, params: Params
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """`make_train_step` with updates per layer.

    Raises:
      ConfigError: if `tx` cannot update one layer without the others.
    """
    in_subspace = config.accumulate_in_subspace and config.accumulate > 1
    train = ng.training.per_layer(
        tx,
        *layered(config.model),
        clip_norm=config.optimizer.clip_norm,
        accumulate=config.accumulate if in_subspace else 1,
        weight_dtype=None if config.weight_bits is None else config.model.param_dtype,
    )

    def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, Metrics]:
        opt_state: Any = state.opt_state
        if in_subspace:
            position = state.micro_step % config.accumulate
            opt_state = ng.training.AccumulatedState(position, opt_state, state.accumulated)
        params, new, metrics = train.step(
            state.params, ng.training.PerLayerState(opt_state, state.totals["grad_norm"]), rows
        )
        opt_state, accumulated = new.opt_state, state.accumulated
        if in_subspace:
            _, opt_state, accumulated = opt_state
        return next_state(
            state,
            metrics._asdict(),
            config.accumulate,
            params=params,
            opt_state=opt_state,
            accumulated=accumulated,
        )

    def first_step(params: Params, rows: jax.Array) -> Any:
        stored = params if config.weight_bits is None else ng.training.quantize_weights(params)
        return train.step(stored, train.init(stored), rows)

    rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.int32)
    try:
        jax.eval_shape(first_step, params, rows)
    except ValueError as error:  # An optimizer that mixes the gradients of parameters.
        raise ConfigError(f"--per-layer with {config.optimizer.name}: {error}") from error
    return ng.training.in_place(step)
