"""Train state: everything that a step changes, saved whole in a checkpoint."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import natgalore_jax as ng
from examples.common.lora import union

Params = Any
Metrics = dict[str, jax.Array]


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
        """Trained parameters as numbers: those stored in 8 bits are decoded, all at once."""
        if not isinstance(self.params, ng.training.QuantizedWeights):
            return self.params
        dtype = self.params.codes["embed"]["embedding"].dtype
        return ng.training.dequantize_weights(self.params, dtype)

    @property
    def weights(self) -> Params:
        """All parameters of the model, as numbers."""
        return union(self.float_params, self.frozen)


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    frozen: Params | None = None,
    low_rank: ng.training.LowRankSteps | None = None,
    weight_bits: int | None = None,
) -> TrainState:
    """The state before the first step, with the matrices of the layers in 8 bits if wanted."""
    zeros = {name: jnp.zeros([], jnp.float32) for name in ("loss", "grad_norm")}
    opt_state = tx.init(params)
    accumulated = {}
    if low_rank is not None:
        accumulated = low_rank.empty_mean(params, opt_state)
    micro_step = jnp.zeros([], jnp.int32)
    stored = params if weight_bits is None else ng.training.quantize_weights(params)
    return TrainState(stored, opt_state, micro_step, zeros, frozen or {}, accumulated)


def metrics_of(loss: jax.Array, grads: Params) -> Metrics:
    """Metrics of a micro-batch, in float32 whatever the dtype of the gradient is."""
    norm = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
    return {"loss": loss.astype(jnp.float32), "grad_norm": norm}


def are_finite(params: Params) -> bool:
    """Whether all floats are finite. Parameters in host memory are looked at one by one."""
    floats = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(_is_finite(ng.training.to_device(x)) for x in floats)


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


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


def updated(
    state: TrainState,
    tx: optax.GradientTransformation,
    grads: Params,
    now: Metrics,
    accumulate: int = 1,
) -> tuple[TrainState, Metrics]:
    """The state after an update of `tx`, of whose steps `accumulate` micro-batches make one."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return next_state(state, now, accumulate, params=params, opt_state=opt_state)
