"""The training step that a configuration describes, and its arguments as shapes."""

import contextlib
import dataclasses
import functools
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

import natgalore_jax as ng
from examples.common.accelerators import platforms_asked_for
from examples.common.errors import ConfigError
from examples.common.lora import partition
from examples.common.train_state import Params, TrainState, init_state
from examples.llama.model.adapters import make_linear
from examples.llama.model.llama import abstract_params
from examples.llama.run_config import RunConfig
from examples.llama.training.optimization import Optimization, make_optimization
from examples.llama.training.per_layer import make_per_layer_step
from examples.llama.training.relora import make_merge
from examples.llama.training.train_step import Apply, make_model, make_train_step


def make_step(
    config: RunConfig, apply: Apply, optimization: Optimization, params: Params
) -> jax.stages.Wrapped:
    """The jitted step, `(state, rows (B, T + 1)) -> (state, metrics)`, which donates the state.

    Raises:
      ConfigError: if layers cannot be updated one by one.
    """
    if config.per_layer:
        step = make_per_layer_step(config, optimization.tx, params)
    else:
        step = make_train_step(
            apply,
            optimization.tx,
            config.accumulate,
            optimization.low_rank,
            config.faults.skip_nonfinite,
        )
    return cast(jax.stages.Wrapped, step)


def first_state(
    config: RunConfig, optimization: Optimization, params: Params, frozen: Params
) -> TrainState:
    """The state before the first step."""
    tx, low_rank = optimization.tx, optimization.low_rank
    return init_state(params, tx, frozen, low_rank, config.weight_bits)


def placed_state(
    config: RunConfig,
    optimization: Optimization,
    params: Params,
    frozen: Params,
    state_at: Any = None,
) -> TrainState:
    """`first_state` where it is to be, by default on the first device. Takes the weights."""
    first = jax.jit(
        functools.partial(first_state, config, optimization),
        # There is no room for the weights twice. A buffer of floats cannot become one of codes.
        donate_argnums=(0, 1) if config.weight_bits is None else (),
        out_shardings=state_at,
    )
    with on_the_host(config):
        state = first(params, frozen)
    if state_at is None and config.weight_bits is not None:
        state = jax.tree.map(_to_device, state)
    if config.offload == "weights":
        layers = ng.training.to_host(state.params["layers"])
        state = state._replace(params={**state.params, "layers": layers})
    return state


def on_the_host(config: RunConfig) -> AbstractContextManager[Any]:
    """Device on which first weights in 8 bits are made: an accelerator that has room for them
    need not have room for the numbers that they are rounded from.

    Raises:
      ConfigError: if JAX_PLATFORMS leaves the processor out.
    """
    if config.weight_bits is None or jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise ConfigError(
            "--weight-bits makes first weights on the processor, which "
            f"JAX_PLATFORMS={platforms_asked_for()} leaves out: add cpu at its end"
        ) from error


def _to_device(x: jax.Array) -> jax.Array:
    """On the first device; what is in host memory stays there."""
    where = SingleDeviceSharding(jax.local_devices()[0], memory_kind=x.sharding.memory_kind)
    return jax.device_put(x, where)


def check_config(config: RunConfig) -> None:
    """Refuse what could not be trained whatever the text is. Nothing is allocated.

    Raises:
      ConfigError: if the optimizer does not fit the model, its adapters, the accumulation or an
        update by layers.
    """
    model = dataclasses.replace(config.model, layers=1)  # All layers have the shapes of one.
    params, _ = partition(abstract_params(model, make_linear(config.adapter)))
    optimization = make_optimization(config, params)
    make_merge(config.adapter, optimization.tx, params, config.seed)
    if config.per_layer:
        make_per_layer_step(dataclasses.replace(config, model=model), optimization.tx, params)


class AbstractRun(NamedTuple):
    """A run of which nothing is allocated."""

    config: RunConfig
    apply: Apply
    optimization: Optimization
    params: Params  # what is trained, as numbers
    state: TrainState  # where it may be stored in fewer bits
    rows: jax.ShapeDtypeStruct  # (B, T + 1), int32

    @property
    def tx(self) -> optax.GradientTransformation:
        return self.optimization.tx

    def compile(self) -> jax.stages.Compiled:
        """The step.

        Raises:
          ConfigError: if layers cannot be updated one by one.
        """
        step = make_step(self.config, self.apply, self.optimization, self.params)
        return step.lower(self.state, self.rows).compile()


def abstract_run(config: RunConfig, tx: optax.GradientTransformation | None = None) -> AbstractRun:
    """The run of `config`, or one with another optimizer, from shapes alone.

    Raises:
      ConfigError: if the optimizer does not fit the model, its adapters or the accumulation.
    """
    made = {}

    def weights():
        made["apply"], weights = make_model(config.model, config.seed, make_linear(config.adapter))
        return weights

    params, frozen = partition(jax.eval_shape(weights))
    optimization = make_optimization(config, params, tx)
    make_merge(config.adapter, optimization.tx, params, config.seed)  # for errors
    state = jax.eval_shape(lambda p, f: first_state(config, optimization, p, f), params, frozen)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.int32)
    return AbstractRun(config, made["apply"], optimization, params, state, rows)
