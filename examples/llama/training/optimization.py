"""The optimizer of a run: what takes its gradients, and how they are accumulated."""

import dataclasses
from typing import NamedTuple

import jax
import optax

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.common.optimizers import make_optimizer
from examples.common.train_state import Params
from examples.llama.run_config import RunConfig
from examples.llama.training.relora import with_restarts


class Optimization(NamedTuple):
    """Optimizer of a run, its schedule and its low-rank steps."""

    tx: optax.GradientTransformation
    schedule: optax.Schedule | None  # Learning rate by step; None: that of a given `tx`.
    low_rank: ng.training.LowRankSteps | None  # Of `tx`, to accumulate gradients in its subspace.


def make_optimization(
    config: RunConfig, params: Params, tx: optax.GradientTransformation | None = None
) -> Optimization:
    """The optimizer that `config` describes, or the one that is given.

    Raises:
      ConfigError: if the optimizer does not fit the model, ReLoRA or the accumulation, or nothing
        can be offloaded here.
    """
    if config.offload != "none":
        _check_host_memory()
    schedule: optax.Schedule | None = None
    if tx is None:
        tx, schedule = _make_optimizer(config, params)
    tx, schedule = with_restarts(config.adapter, tx, schedule, config.accumulate)
    if config.offload != "none":
        tx = ng.training.offload_state(tx)
    low_rank = _low_rank_steps(config, tx) if config.accumulate_in_subspace else None
    return Optimization(tx, schedule, low_rank)


def _make_optimizer(
    config: RunConfig, params: Params
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    optimizer = dataclasses.replace(
        config.optimizer,
        learning_rate=config.learning_rate,
        unprojected_ratio=config.unprojected_ratio,
    )
    if config.per_layer:  # It clips by itself: no layer can wait for the norm of all gradients.
        optimizer = dataclasses.replace(optimizer, clip_norm=None)
    try:
        tx, schedule = make_optimizer(
            optimizer,
            config.schedule,
            steps=config.steps,
            accumulate=1 if config.accumulate_in_subspace else config.accumulate,
            seed=config.seed,
        )
        jax.eval_shape(tx.init, params)
    except ValueError as error:  # A rank that fits no matrix, a negative damping, ...
        raise ConfigError(f"{config.optimizer.name}: {error}") from error
    return tx, schedule


def _low_rank_steps(
    config: RunConfig, tx: optax.GradientTransformation
) -> ng.training.LowRankSteps:
    try:
        steps = ng.training.low_rank_steps(tx)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "--accumulate-in-subspace needs an optimizer with a subspace, such as galore: "
            f"{config.optimizer.name}: {error}"
        ) from error
    if steps.needs_full:
        raise ConfigError(
            f"--accumulate-in-subspace: the residual of {config.optimizer.name} needs the whole "
            "gradient; use --residual none"
        )
    return steps


def _check_host_memory() -> None:
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise ConfigError(
            f"--offload needs a device that reaches pinned_host memory; {device} has "
            f"{', '.join(kinds)}"
        )
