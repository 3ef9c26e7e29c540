"""One training step, as a pure function of a state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import natgalore_jax as ng
from examples.common.frozen import union
from examples.llama.model.config import ModelConfig
from examples.llama.model.llama import Llama, MakeLinear, dense
from examples.llama.training.accumulation import accumulate_low_rank, empty_accumulator

Params = Any
Metrics = dict[str, jax.Array]
Apply = Callable[[Params, jax.Array], jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes; saved as it is in a checkpoint."""

    params: Params  # what is trained; an ng.training.QuantizedWeights with --weight-bits.
    opt_state: optax.OptState
    micro_step: jax.Array  # batches seen. shape=(), dtype=jnp.int32.
    totals: Metrics  # metrics summed over the batches of an unfinished accumulation.
    frozen: Params  # weights that no step changes; {} if all are trained.
    # Mean of the low-rank gradients of an unfinished accumulation in the subspace; {} without one.
    accumulated: Params = {}  # noqa: RUF012  (never changed)

    @property
    def float_params(self) -> Params:
        """What is trained, as numbers: what is stored in 8 bits is decoded, all at once."""
        if not isinstance(self.params, ng.training.QuantizedWeights):
            return self.params
        dtype = self.params.codes["embed"]["embedding"].dtype
        return ng.training.dequantize_weights(self.params, dtype)

    @property
    def weights(self) -> Params:
        """All parameters of the model, as numbers."""
        return union(self.float_params, self.frozen)


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
    return nll_of_logits(apply(params, rows[:, :-1]), rows)


def nll_of_logits(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """The same, given what the model makes of all tokens but the last, (B, T, V)."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    frozen: Params | None = None,
    low_rank: ng.training.LowRankSteps | None = None,
    weight_bits: int | None = None,
) -> TrainState:
    """The state before the first step, with the matrices of the layers in 8 bits if wanted."""
    zeros = {"loss": jnp.zeros([]), "grad_norm": jnp.zeros([])}
    opt_state = tx.init(params)
    accumulated = {} if low_rank is None else empty_accumulator(low_rank, params, opt_state)
    micro_step = jnp.zeros([], jnp.int32)
    stored = params if weight_bits is None else ng.training.quantize_weights(params)
    return TrainState(stored, opt_state, micro_step, zeros, frozen or {}, accumulated)


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
        def mean_nll(params: Params) -> jax.Array:
            return token_nll(apply, union(params, state.frozen), rows).mean()

        loss, grads = jax.value_and_grad(mean_nll)(state.params)
        now = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        if not skip_nonfinite:
            return take(state, grads, now)
        finite = jnp.isfinite(now["loss"]) & jnp.isfinite(now["grad_norm"])
        state, metrics = jax.lax.cond(
            finite, take, lambda state, grads, now: (state, now), state, grads, now
        )
        return state, {**metrics, "skipped": ~finite}

    def take(state: TrainState, grads: Params, now: Metrics) -> tuple[TrainState, Metrics]:
        position = state.micro_step % accumulate
        accumulated = state.accumulated
        if low_rank is None:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        else:
            params, opt_state, accumulated = accumulate_low_rank(
                low_rank, grads, state.opt_state, state.params, accumulated, position, accumulate
            )

        return next_state(
            state,
            now,
            accumulate,
            params=params,
            opt_state=opt_state,
            accumulated=accumulated,
        )

    return ng.training.in_place(step)


def next_state(
    state: TrainState, now: Metrics, accumulate: int, **changed: Any
) -> tuple[TrainState, Metrics]:
    """The state after a micro-batch with the metrics `now`, and their means over its step."""
    position = state.micro_step % accumulate
    totals = jax.tree.map(
        lambda total, x: jnp.where(position == 0, x, total + x), state.totals, now
    )
    metrics = jax.tree.map(lambda total: total / (position + 1), totals)
    new = state._replace(micro_step=state.micro_step + 1, totals=totals, **changed)
    return new, metrics
