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
    zeros = {"loss": jnp.zeros([]), "grad_norm": jnp.zeros([])}
    opt_state = tx.init(params)
    accumulated = {}
    if low_rank is not None:
        accumulated = low_rank.empty_mean(params, opt_state)
    micro_step = jnp.zeros([], jnp.int32)
    stored = params if weight_bits is None else ng.training.quantize_weights(params)
    return TrainState(stored, opt_state, micro_step, zeros, frozen or {}, accumulated)


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
