"""The gradient of a batch, the step that follows the last batch, and losses without gradients.

They are programs of their own: that of a batch is compiled for each of its shapes, and an optimizer
once.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.common.lora import union
from examples.common.train_state import Metrics, Params, TrainState, metrics_of, updated
from examples.finetune.planner.batches import Batch, learned_tokens
from examples.finetune.planner.methods import GraphDef
from examples.llama.model.llama import Llama

Step = Callable[[TrainState, Sequence[Batch]], tuple[TrainState, Metrics]]


def summed_nll(model: Llama, batch: Batch) -> jax.Array:
    """Negative log-likelihood of all learned tokens, in nats, float32."""
    tokens = jnp.asarray(batch.tokens)
    x = model.run_layers(model.embed(tokens), jnp.arange(tokens.shape[1]))  # (B, T, D)
    chosen = jnp.take_along_axis(x, jnp.asarray(batch.positions)[..., None], axis=1)  # (B, C, D)
    logits = model.logits(chosen).astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.targets))
    return jnp.sum(nll * batch.weight)


loss_of = jax.jit(summed_nll)


def make_step(graphdef: GraphDef, tx: optax.GradientTransformation) -> Step:
    """A function of a state and the batches of a step to the new state, and loss and grad_norm.

    The loss is the mean over the learned tokens of all batches together, so that it does not matter
    which rows share a batch. The state that is passed in is donated.
    """

    @jax.jit
    def gradient(
        params: Params, frozen: Params, batch: Batch, total: jax.Array
    ) -> tuple[jax.Array, Params]:
        def share(params: Params) -> jax.Array:
            return summed_nll(nnx.merge(graphdef, union(params, frozen)), batch) / total

        return jax.value_and_grad(share)(params)

    def update(state: TrainState, grads: Params, loss: jax.Array) -> tuple[TrainState, Metrics]:
        return updated(state, tx, grads, metrics_of(loss, grads))

    add = jax.jit(optax.tree.add, donate_argnums=0)
    update = jax.jit(update, donate_argnums=0)

    def step(state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, Metrics]:
        total = learned_tokens(batches)
        found = None
        for batch in batches:
            new = gradient(state.params, state.frozen, batch, total)
            found = new if found is None else add(found, new)
        assert found is not None, "a step has a batch"
        loss, grads = found
        return update(state, grads, loss)

    return step
