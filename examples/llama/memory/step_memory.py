"""Memory of a training step, part by part, before anything is allocated.

Exact, from shapes: weights, optimizer state, batch and counters. What comes and goes within a step
is what the compiler reserves for it, ahead of time. How that is divided, and what it would be in
bfloat16 on another device than the one it is compiled for, is an estimate; see docs/memory.md.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.common.train_state import Params, TrainState
from examples.llama.memory.sizes import format_bytes
from examples.llama.run_config import RunConfig
from examples.llama.training.build import AbstractRun, abstract_run
from examples.llama.training.train_step import token_nll
from natgalore_jax._src.memory.compiled_step import bytes_per_device


class StepMemory(NamedTuple):
    """Bytes of a training step at its peak."""

    weights: int  # trained and frozen
    state: Mapping[str, int]  # of the optimizer, by part; without empty ones
    batch: int  # the rows, counters and metrics
    temporary: Mapping[str, int]  # what comes and goes, by part

    @property
    def parts(self) -> dict[str, int]:
        return {"weights": self.weights, **self.state, "batch": self.batch, **self.temporary}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return {"total": self.total, **self.parts}


def of_compiled(
    compiled: jax.stages.Compiled,
    state: TrainState,
    tx: optax.GradientTransformation,
    per_layer: bool,
) -> StepMemory | None:
    """The memory of a compiled step, where the backend gives an account of it.

    The total is the compiler's own: arguments, results that are not in their place, temporaries.
    Arrays in host memory are not counted, and the kept bytes are then not split into parts.
    """
    if compiled.memory_analysis() is None:
        return None
    params = _float_params(state)
    report = ng.memory_report(
        tx, params, step=compiled, live_gradients=live_gradients(params, per_layer)
    )
    step = cast(ng.training.StepMemory, report.step)
    kept = step.argument_bytes + step.result_bytes
    parts = {"gradients": step.gradient_bytes, "activations and update": step.activation_bytes}
    if step.host_bytes:
        return StepMemory(0, {"kept on the device": kept}, 0, parts)
    return _divided(report, state, kept)._replace(temporary=parts)


def predict(
    config: RunConfig,
    tx: optax.GradientTransformation | None = None,
    run: AbstractRun | None = None,
) -> StepMemory:
    """The memory of a step of `config` on one device, without allocating it.

    Two steps are compiled: that of the optimizer, and one with plain gradient descent, whose
    temporaries are gradients and activations. What the optimizer's has beyond them is the working
    memory of its update. On a CPU bfloat16 is not compiled, as that backend makes float32 copies of
    it, but float32, and what is in bfloat16 counts half:

    - gradients are counted from shapes, in the dtype of the parameters: of all of them, or with
      `per_layer` of the largest part;
    - activations are multiplied by the bytes that JAX keeps for the backward pass in the model's
      dtype over those in float32: logits, attention weights and norms stay float32;
    - the update of all parameters at once works on trees in their dtype. Updates per layer count
      in full, as the arithmetic of a single matrix is done in float32.

    Args:
      config: the run.
      tx: an optimizer to use instead of the one that `config` names.
      run: `abstract_run(config, tx)`, if it is there already.

    Raises:
      ConfigError: if the optimizer does not fit the model, the step or the accumulation.
    """
    run = abstract_run(config, tx) if run is None else run
    bound, base = lower_bound(run), _baseline_of(config)
    exact = compiles_as_it_is(config)
    compiled = (run if exact else abstract_run(as_float32(config), tx)).compile()
    temporary = temporary_bytes(compiled)
    update = temporary - base.compiled_temporary
    if not exact and not config.per_layer:
        update = update * jnp.dtype(config.model.param_dtype).itemsize // 4
    if not exact:
        return bound._replace(temporary={**bound.temporary, "update": max(update, 0)})
    # The optimizer's step may need less than plain descent, if it is scheduled in another way.
    gradients = min(base.gradients, temporary)
    activations = min(base.activations, temporary - gradients)
    parts = {"gradients": gradients, "activations": activations}
    parts["update"] = temporary - gradients - activations
    whole = of_compiled(compiled, run.state, run.tx, config.per_layer)
    assert whole is not None
    return whole._replace(temporary=parts)


def lower_bound(run: AbstractRun) -> StepMemory:
    """Result of :func:`predict` without the working memory of the update: of the optimizer's
    step nothing is compiled."""
    base = _baseline_of(run.config)
    parts = {"gradients": base.gradients, "activations": base.activations}
    return resident(run)._replace(temporary=parts)


def resident(run: AbstractRun) -> StepMemory:
    """Memory that stays from step to step, and the batch: exact, and nothing is compiled."""
    metrics = run.state.totals
    report = ng.memory_report(run.tx, _float_params(run.state))
    return _divided(report, run.state, bytes_per_device((run.state, run.rows, metrics)))


def accelerator_memory() -> int | None:
    """Bytes of the first device; None for a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _host_memory() -> int | None:
    """Bytes; None where the operating system does not say."""
    if not hasattr(os, "sysconf"):  # Not on Windows.
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_batch(config: RunConfig) -> None:
    """Raise a ConfigError if the logits of a batch alone are larger than the memory.

    The operating system would kill the program without a message.
    """
    room = accelerator_memory() or _host_memory()
    if room is None:
        return
    devices = jax.device_count() if config.distributed.enabled else 1
    row = 4 * config.seq_len * config.model.vocab_size  # float32
    if config.batch_size // devices * row > room:
        raise ConfigError(
            f"batch_size={config.batch_size}: logits of {format_bytes(row)} a row leave room for "
            f"less than {room // row * devices} rows in {format_bytes(room)}: take fewer, with "
            "--accumulate; python -m examples.llama.plan finds how many fit"
        )


class _Baseline(NamedTuple):
    """A step with plain gradient descent."""

    compiled_temporary: int  # bytes, in the dtypes that it was compiled in
    gradients: int  # bytes, in the dtypes of the configuration
    activations: int  # bytes, in the dtypes of the configuration


def _baseline_of(config: RunConfig) -> _Baseline:
    """Compiled once for all optimizers."""
    changes = {"optimizer": RunConfig().optimizer, "accumulate": 1, "accumulate_in_subspace": False}
    return _compiled_baseline(dataclasses.replace(config, **changes))


@functools.cache
def _compiled_baseline(config: RunConfig) -> _Baseline:
    descent = optax.sgd(1.0)
    run = abstract_run(config, descent)
    gradients = live_gradients(run.params, config.per_layer)
    if compiles_as_it_is(config):
        temporary = temporary_bytes(run.compile())
        # The compiler may use the room of gradients again before it has all of them.
        gradients = min(gradients, temporary)
        return _Baseline(temporary, gradients, temporary - gradients)
    full = abstract_run(as_float32(config), descent)
    temporary = temporary_bytes(full.compile())
    activations = max(temporary - live_gradients(full.params, config.per_layer), 0)
    share = saved_bytes(config) / saved_bytes(as_float32(config))
    return _Baseline(temporary, gradients, round(share * activations))


def compiles_as_it_is(config: RunConfig) -> bool:
    """Whether a step compiled in its own dtypes takes what it will take."""
    dtypes = {config.model.dtype, config.model.param_dtype}
    return dtypes == {"float32"} or jax.default_backend() != "cpu"


def as_float32(config: RunConfig) -> RunConfig:
    model = dataclasses.replace(config.model, dtype="float32", param_dtype="float32")
    return dataclasses.replace(config, model=model)


def live_gradients(params: Params, per_layer: bool) -> int:
    """Bytes of the gradients that exist at the same time.

    With updates per layer: the largest of one layer of the stack, what comes before it and what
    comes after it. The gradient of a tied embedding stays from the head's backward pass to the
    end, beside a layer's.
    """
    if not per_layer:
        return bytes_per_device(params)
    layers, embedding = params["layers"], bytes_per_device(params["embed"])
    one_layer = bytes_per_device(layers) // jax.tree.leaves(layers)[0].shape[0]
    rest = bytes_per_device({k: v for k, v in params.items() if k not in ("layers", "embed")})
    if "head" not in params:
        return one_layer + embedding + rest
    return max(one_layer, embedding, rest)


def saved_bytes(config: RunConfig) -> int:
    """Bytes that JAX keeps from the forward for the backward pass, beside the weights."""
    model = dataclasses.replace(config.model, remat=False)
    config = dataclasses.replace(config, model=model, weight_bits=None)
    run = abstract_run(config, optax.sgd(1.0))
    weights = run.state.weights

    def backward(weights, rows):
        return jax.vjp(lambda w: token_nll(run.apply, w, rows).mean(), weights)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, weights, run.rows))
    of_weights = {(x.shape, x.dtype) for x in jax.tree.leaves(weights)}
    return bytes_per_device([x for x in kept if (x.shape, x.dtype) not in of_weights])


def _divided(report: ng.MemoryReport, state: TrainState, kept: int) -> StepMemory:
    """`kept` bytes of a device divided into the weights, the optimizer's state, and the rest."""
    optimizer = bytes_per_device(state.opt_state)
    # The report counts sharded arrays whole.
    is_whole = report.total_state_bytes == optimizer
    parts = dict(report.part_bytes) if is_whole else {"state": optimizer}
    sums = bytes_per_device(_sums(state.opt_state))
    parts["inner" if is_whole else "state"] -= sums
    parts["accumulated"] = bytes_per_device(state.accumulated) + sums
    parts = {name: size for name, size in parts.items() if size}
    weights = bytes_per_device((state.params, state.frozen))
    return StepMemory(weights, parts, kept - weights - sum(parts.values()), {})


def _sums(opt_state: Any) -> list[Params]:
    """Of whole gradients, which `optax.MultiSteps` accumulates in its state."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, optax.MultiStepsState))
    return [state.acc_grads for state in states if isinstance(state, optax.MultiStepsState)]


def _float_params(state: TrainState) -> Params:
    """The trained parameters as the optimizer sees them, or their shapes."""
    if not isinstance(state.params, ng.training.QuantizedWeights):
        return state.params
    return jax.eval_shape(lambda state: state.float_params, state)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that XLA reserves for temporary arrays."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend gives no account of the memory of compiled programs")
    return analysis.temp_size_in_bytes
