"""Runs that go on: the checkpoint that is used, and settings that differ from those before."""

from pathlib import Path
from typing import Any

import jax

from examples.common.checkpoints import (
    Checkpoints,
    done_in,
    kept,
    quarantine,
    read_checkpoint,
    renumber,
)
from examples.common.errors import ConfigError
from examples.common.reporter import Reporter
from examples.common.run_directory import CHECKPOINTS
from examples.common.train_state import TrainState
from examples.llama.run_config import OF_STEPS_LEFT, RunConfig, adjustments, differences


def prepare(run_dir: Path, config: RunConfig, identity: dict[str, Any], reporter: Reporter) -> None:
    """Make the newest undamaged checkpoint the newest, counted in batches as `config` counts.

    Raises:
      ConfigError: if all checkpoints are damaged, or a step is unfinished whose batches `config`
        divides in another way.
    """
    checkpoints = run_dir / CHECKPOINTS
    damaged = quarantine(checkpoints)
    for what in damaged:
        reporter.note(f"damaged, using the checkpoint before: {what}")
    numbers = kept(checkpoints)
    if damaged and not numbers:
        raise ConfigError(
            f"{run_dir}: every checkpoint is damaged and was moved to {run_dir / 'damaged'}: "
            "pass --overwrite to start anew"
        )
    if not numbers:
        return
    before, _ = read_checkpoint(checkpoints, numbers[-1])
    if differences(before, identity):
        return
    accumulate = before.get("accumulate", config.accumulate)
    step, batches = done_in(checkpoints, numbers[-1])
    _check_steps(run_dir, step, config)
    if batches and accumulate != config.accumulate:
        raise ConfigError(
            f"{run_dir} was stopped within step {step + 1}, of {accumulate} batches: complete it, "
            "at the rate that ends its schedule, with "
            f"--accumulate {accumulate} --batch-size {before['batch_size']} --steps {step + 1} "
            "before another --accumulate"
        )
    # By the name: an earlier start may have renamed it, and saved nothing.
    if numbers[-1] != step * config.accumulate + batches:
        renumber(checkpoints, config.accumulate)


def check_resume(
    checkpoints: Checkpoints,
    run_dir: Path,
    config: RunConfig,
    identity: dict[str, Any],
    reporter: Reporter,
) -> None:
    """Check that a run in `run_dir` may start or go on, and say where and with what changes.

    Raises:
      ConfigError: if there are checkpoints and the run is not to be resumed, or settings differ
        that have to be equal, or more steps are done than `config` asks for, or all of them, and
        settings of steps differ.
    """
    resume = config.output.resume
    done = checkpoints.resume_point(
        identity, run_dir, resume=resume, note=reporter.note, differences=differences
    )
    step = done // config.accumulate
    _check_steps(run_dir, step, config)
    if resume and checkpoints.latest() is not None:
        changed = adjustments(checkpoints.config(), identity) if done else []
        late = [text for text in changed if text.startswith(OF_STEPS_LEFT)]
        if late and step == config.steps:
            raise ConfigError(
                f"{run_dir} has done all {step} steps, and none is left to train with "
                f"{', '.join(late)}: give a larger --steps, or leave that out"
            )
        reporter.note(", ".join([f"resuming after step {step}", *changed]))


def _check_steps(run_dir: Path, step: int, config: RunConfig) -> None:
    if step > config.steps:
        raise ConfigError(f"{run_dir} has done {step} steps, got steps={config.steps}")


def recounted(state: TrainState, before: int, after: int) -> TrainState:
    """The state after whole steps of `before` batches, as a run with steps of `after` counts."""
    if before == after:
        return state
    micro_step = state.micro_step // before * after
    return state._replace(micro_step=jax.device_put(micro_step, state.micro_step.sharding))
