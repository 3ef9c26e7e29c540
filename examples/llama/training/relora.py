"""ReLoRA: merge W0 ← W0 + scale · A B, start A and B anew, and restart the learning rate.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", 2023. What the optimizer keeps
for A and B goes back to its first values; the paper prunes 90 to 99.9 % of it. Everything else
stays, Adam's step counter included, so that the first updates after a merge are without bias
correction and large. That is why the learning rate warms up again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.common.lora import Tree, adapter_of, init_a, with_product
from examples.common.train_state import TrainState
from examples.llama.model.adapters import AdapterConfig


def merge(params: Tree, frozen: Tree, scale: float, key: jax.Array) -> tuple[Tree, Tree]:
    """The same model with the products inside the frozen weights, A random and B zero.

    Args:
      params: trained weights, with ``lora.lora_a (..., in, r)`` and ``lora.lora_b (..., r, out)``.
      frozen: ``base.kernel (..., in, out)`` of the same layers.
      scale: of the product.
      key: a random key, for A.

    Returns:
      The new params and frozen, with the dtypes of the old ones. Products and sums are float32.
    """
    flat: Tree = flatten_dict(params)
    merged: Tree = flatten_dict(frozen)
    for i, (path, W0) in enumerate(merged.items()):
        a, b = adapter_of(path)
        merged[path] = with_product(W0, flat[a], flat[b], scale)
        flat[a] = init_a(jax.random.fold_in(key, i), flat[a].shape, flat[a].dtype)
        flat[b] = jnp.zeros_like(flat[b])
    return unflatten_dict(flat), unflatten_dict(merged)


def reset_adapters(
    tx: optax.GradientTransformation, opt_state: optax.OptState, params: Tree
) -> optax.OptState:
    """The state of `tx` with what it keeps for A and B as `tx.init` makes it.

    The paths of what an optimizer keeps for a parameter contain that of the parameter.
    """
    adapter = jax.tree_util.DictKey("lora")
    return jax.tree.map_with_path(
        lambda path, new, old: new if adapter in path else old, tx.init(params), opt_state
    )


def make_merge(
    adapter: AdapterConfig,
    tx: optax.GradientTransformation,
    params: Tree,
    seed: int,
    state_at: Any = None,
) -> Callable[[TrainState], TrainState]:
    """A jitted merge of the whole train state, which is donated, and stays where `state_at` says.

    Raises:
      ConfigError: if there will be merges and `tx` projects some of `params`. A basis at its first
        value is zero, and would keep A and B where they are until its next refresh.
    """
    if adapter.kind == "relora":
        for parameter in ng.memory_report(tx, params).parameters:
            if parameter.projected:
                raise ConfigError(
                    "relora starts the optimizer of its adapters anew, which needs one without a "
                    f"subspace, such as --optimizer adamw; this one projects {parameter.path}"
                )

    def run(state: TrainState) -> TrainState:
        # The streams of `make_model` count up from 0 and never get here.
        key = jax.random.fold_in(jax.random.key(seed), 2**32 - 2)
        key = jax.random.fold_in(key, state.micro_step)
        params, frozen = merge(state.params, state.frozen, adapter.scale, key)
        opt_state = reset_adapters(tx, state.opt_state, params)
        return state._replace(params=params, frozen=frozen, opt_state=opt_state)

    return jax.jit(run, donate_argnums=0, out_shardings=state_at)


def restart_factor(adapter: AdapterConfig, step: jax.typing.ArrayLike) -> jax.Array:
    """Factor on the learning rate of a step, counted from 0.

    A linear warm-up after each merge, whose first step already moves: with w steps of warm-up, the
    step that t others precede since the merge has (t + 1) / (w + 1), and from t = w on 1.
    """
    step = jnp.asarray(step)
    since = step % adapter.merge_every
    warmup = jnp.minimum(1.0, (since + 1) / (adapter.restart_warmup + 1))
    return jnp.where(step < adapter.merge_every, 1.0, warmup)


def with_restarts(
    adapter: AdapterConfig,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    accumulate: int,
) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """Optimizer and learning rate by step, multiplied by the :func:`restart_factor` for ReLoRA.

    The updates are multiplied, which for an optimizer whose updates are proportional to its
    learning rate is a restart of the learning rate, whichever schedule it has inside.
    """
    if adapter.kind != "relora":
        return tx, schedule
    factor = functools.partial(restart_factor, adapter)
    tx = optax.chain(
        tx, optax.scale_by_schedule(lambda count: factor(jnp.asarray(count) // accumulate))
    )
    if schedule is None:
        return tx, None
    return tx, lambda step: schedule(step) * factor(step)
