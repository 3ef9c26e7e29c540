"""One training step, as a pure function of a state and a batch.

Gradients of micro-batches can be averaged in the subspace of the optimizer: the accumulator is as
small as a moment of the optimizer, which runs once for each step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import natgalore_jax as ng
from examples.common.lora import union
from examples.common.train_state import Metrics, Params, TrainState, metrics_of, next_state, updated
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import Llama, MakeLinear, dense

Apply = Callable[[Params, jax.Array], jax.Array]


def make_model(
    config: ModelConfig,
    seed: int,
    make_linear: MakeLinear = dense,
    params_at: Callable[[Params], Any] | None = None,
) -> tuple[Apply, Params]:
    """The model as a function `(params, tokens (B, T)) -> logits (B, T, V)`, and first params.

    `params_at` says of their shapes which shardings they get. Without it they are on one device.
    """

    def make(key):
        # The default stream counts up from 0 and never gets to this key.
        rngs = nnx.Rngs(key, adapter=jax.random.fold_in(key, 2**32 - 1))
        return Llama(config, rngs=rngs, make_linear=make_linear)

    def initial(key):
        return nnx.to_pure_dict(nnx.state(make(key), nnx.Param))

    key = jax.random.key(seed)
    graphdef = nnx.graphdef(nnx.eval_shape(make, key))

    def apply(params: Params, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens)

    where = None if params_at is None else params_at(jax.eval_shape(initial, key))
    return apply, jax.jit(initial, out_shardings=where)(key)


def token_nll(apply: Apply, params: Params, rows: jax.Array) -> jax.Array:
    """Negative log-likelihood in nats, (B, T), of rows (B, T + 1) given what precedes."""
    return nll_of_logits(apply(params, inputs_of(rows)), rows)


def inputs_of(rows: jax.Array) -> jax.Array:
    """All tokens but the last, (B, T). Padding, below 0, comes last, and reads as any token."""
    return jnp.maximum(rows[:, :-1], 0)


def nll_of_logits(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """The same, given what the model makes of all tokens but the last, (B, T, V)."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])


def mean_over_targets(nll: jax.Array, rows: jax.Array) -> jax.Array:
    """The mean of (B, T) over the targets of rows (B, T + 1) that are no padding."""
    is_target = rows[:, 1:] >= 0
    return jnp.where(is_target, nll, 0.0).sum() / jnp.maximum(is_target.sum(), 1)


def make_train_step(
    apply: Apply,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    low_rank: ng.training.LowRankSteps | None = None,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """A jitted `(state, rows (B, T + 1)) -> (state, metrics)` that takes one micro-batch.

    `accumulate` micro-batches make a step: in `tx` itself, or in its subspace with `low_rank`, the
    steps of `tx`. The metrics are means over the micro-batches of the step so far. The state that
    is passed in is donated. With `skip_nonfinite` a micro-batch whose loss or gradient is not
    finite changes nothing, not even the count of micro-batches; the metric "skipped" says so.
    """

    def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, Metrics]:
        def loss_of(params: Params) -> jax.Array:
            return mean_over_targets(token_nll(apply, union(params, state.frozen), rows), rows)

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        now = metrics_of(loss, grads)
        if not skip_nonfinite:
            return take(state, grads, now)
        finite = jnp.isfinite(now["loss"]) & jnp.isfinite(now["grad_norm"])
        state, metrics = jax.lax.cond(
            finite, take, lambda state, grads, now: (state, now), state, grads, now
        )
        return state, {**metrics, "skipped": ~finite}

    def take(state: TrainState, grads: Params, now: Metrics) -> tuple[TrainState, Metrics]:
        if low_rank is None:
            return updated(state, tx, grads, now, accumulate)
        position, update = state.micro_step % accumulate, low_rank.update
        opt_state, mean = low_rank.accumulate(grads, state.opt_state, state.accumulated, position)

        def applied(params, opt_state):
            low = optax.tree.cast_like(mean, grads)
            updates, opt_state = update(low, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        # The branch that changes nothing stands last: XLA does not copy what goes through it.
        params, opt_state = jax.lax.cond(
            position == accumulate - 1, applied, lambda *of: of, state.params, opt_state
        )
        return next_state(
            state, now, accumulate, params=params, opt_state=opt_state, accumulated=mean
        )

    return ng.training.in_place(step)
