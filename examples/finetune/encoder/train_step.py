"""One training step and the predictions of a split."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.common.lora import union
from examples.common.train_state import Metrics, Params, TrainState, metrics_of, updated
from examples.finetune.encoder.data.batches import Batch, Layout, eval_batches
from examples.finetune.encoder.data.encode import Encoded
from examples.finetune.encoder.model import Apply, Inputs

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Predict = Callable[[Params, Inputs], jax.Array]


def row_losses(outputs: jax.Array, labels: jax.typing.ArrayLike, regression: bool) -> jax.Array:
    """Loss of each row, (B,), of outputs (B, C): cross-entropy in nats, or the squared error."""
    if regression:
        return (outputs[:, 0] - labels) ** 2
    return optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.asarray(labels))


def make_step(
    apply: Apply, tx: optax.GradientTransformation, *, regression: bool, seed: int
) -> Step:
    """A jitted step that returns the new state and metrics. The old state is donated."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.micro_step)

        def mean_loss(params: Params) -> jax.Array:
            outputs = apply(union(params, state.frozen), batch.inputs, key)
            losses = row_losses(outputs, batch.labels, regression)
            return jnp.sum(batch.weight * losses) / jnp.sum(batch.weight)

        loss, grads = jax.value_and_grad(mean_loss)(state.params)
        return updated(state, tx, grads, metrics_of(loss, grads))

    return jax.jit(step, donate_argnums=0)


def make_predict(apply: Apply) -> Predict:
    """A jitted function of weights and inputs to outputs (B, C), with nothing dropped."""
    return jax.jit(lambda weights, inputs: apply(weights, inputs, None))


def predictions(
    predict: Predict,
    weights: Params,
    encoded: Encoded,
    layout: Layout,
    should_stop: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """Outputs of all rows, (rows, C), in the order of the rows.

    None if `should_stop`, asked before each batch, says so.
    """
    order, found = [], []
    for rows, batch in eval_batches(encoded, layout):
        if should_stop():
            return None
        order.append(rows)
        found.append(np.asarray(predict(weights, batch.inputs))[: len(rows)])
    return np.concatenate(found)[np.argsort(np.concatenate(order))]


def decisions(outputs: np.ndarray, regression: bool) -> np.ndarray:
    """Predicted classes, or numbers of a regression, (rows,)."""
    return outputs[:, 0] if regression else np.argmax(outputs, axis=-1)
