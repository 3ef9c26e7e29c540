"""Accumulation of low-rank gradients over micro-batches, as one transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.training.low_rank_steps import low_rank_steps


class AccumulatedState(NamedTuple):
    """State of :func:`.per_layer`'s optimizer with ``accumulate`` above one."""

    mini_step: jax.typing.ArrayLike  #: shape (), int32: micro-batches of the unfinished step
    opt_state: Any  #: of the optimizer
    mean: Any  #: mean of the low-rank gradients so far, in their shapes, float32 at least


def accumulated(tx: Any, number: int) -> optax.GradientTransformationExtraArgs:
    """``tx`` with one step for ``number`` gradients, whose low-rank gradients are averaged.

    The first gradient of a step determines its basis. Updates in between are zero.

    Raises:
      TypeError, ValueError: as :func:`.low_rank_steps`, and for a residual.
    """
    steps = low_rank_steps(tx)
    if steps.needs_full:
        raise ValueError(
            "a residual needs the full gradient of a step, which does not exist when low-rank "
            "gradients are accumulated: make the optimizer with residual='none', or accumulate "
            "full gradients with optax.MultiSteps(tx, ...)"
        )

    def init_fn(params):
        state = tx.init(params)
        return AccumulatedState(jnp.zeros([], jnp.int32), state, steps.empty_mean(params, state))

    def update_fn(updates, state, params=None, **extra_args):
        position = state.mini_step

        def take(opt_state, mean):
            low = optax.tree.cast_like(mean, updates)
            return steps.update(low, opt_state, params, **extra_args)

        def wait(opt_state, mean):
            # A learning rate of another dtype changes that of the updates.
            like, _ = jax.eval_shape(take, opt_state, mean)
            zeros = jax.tree.map(lambda g, u: jnp.zeros_like(g, dtype=u.dtype), updates, like)
            return zeros, opt_state

        opt_state, mean = steps.accumulate(updates, state.opt_state, state.mean, position)
        new, opt_state = jax.lax.cond(position == number - 1, take, wait, opt_state, mean)
        return new, AccumulatedState((position + 1) % number, opt_state, mean)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
