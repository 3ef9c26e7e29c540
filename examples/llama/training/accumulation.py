"""Gradients of micro-batches averaged in the subspace of the optimizer.

The accumulator is as small as a moment of the optimizer, which runs once for each step. The basis
of a step is decided by its first micro-batch.
"""

from typing import Any

import jax
import optax

import natgalore_jax as ng

Params = Any


def empty_accumulator(
    steps: ng.training.LowRankSteps, params: Params, opt_state: optax.OptState
) -> Params:
    """The mean of no gradients: zeros, sharded as low-rank gradients will be."""
    return optax.tree.zeros_like(steps.project(params, opt_state))


def accumulate_low_rank(
    steps: ng.training.LowRankSteps,
    grads: Params,
    opt_state: optax.OptState,
    params: Params,
    mean: Params,
    position: jax.Array,
    number: int,
) -> tuple[Params, optax.OptState, Params]:
    """Takes the gradient of one micro-batch, and after the last one of a step the step.

    Args:
      steps: of the optimizer.
      grads: of this micro-batch.
      opt_state, params: before it.
      mean: of the low-rank gradients of this step so far.
      position: how many they are, int32; at 0 the old mean does not matter.
      number: of micro-batches in a step.

    Returns:
      The new params, opt_state and mean.
    """

    def take(params, opt_state, mean):
        updates, opt_state = steps.update(mean, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, mean = steps.accumulate(grads, opt_state, mean, position)
    # The branch that changes nothing stands last: XLA does not copy what goes through it.
    params, opt_state = jax.lax.cond(
        position == number - 1,
        take,
        lambda params, opt_state, mean: (params, opt_state),
        *(params, opt_state, mean),
    )
    return params, opt_state, mean
