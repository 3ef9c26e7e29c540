"""An optimizer's update of a few parameters, as a part of its update of all of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from natgalore_jax._src.params.context import LayerView, layer_view
from natgalore_jax._src.per_layer.dependence import sources_of_outputs
from natgalore_jax._src.per_layer.layer_parts import Parts
from natgalore_jax._src.per_layer.state_layout import StateLayout


class SplitOptimizer(NamedTuple):
    """An optimizer, and what its parameters and its state consist of."""

    tx: optax.GradientTransformationExtraArgs
    apply_updates: Callable[[Any, Any, Any], Any]  # (params, updates, opt_state) -> params
    parts: Parts
    layout: StateLayout


class PartUpdate(NamedTuple):
    """Result of an update, leaf by leaf."""

    params: list[jax.Array]  # of the active parameters
    own: list[jax.Array]  # the state of the active parameters
    shared: list[jax.Array]  # the state that belongs to no parameter


def update_part(
    optimizer: SplitOptimizer,
    active: Sequence[int],
    index: jax.typing.ArrayLike,
    G: Sequence[jax.Array],
    W: Sequence[jax.Array],
    own: Sequence[jax.Array],
    shared: Sequence[jax.Array],
) -> PartUpdate:
    """Runs the optimizer on all parameters, of which only the active ones are real.

    The others are zeros, so that the tree is the one that masks, labels and schedules were made
    for. Nothing that is returned depends on them, and XLA removes what is computed from them.

    Args:
      optimizer: see there.
      active: numbers of parameters.
      index: which layer the stacked ones among them are.
      G, W: gradients and values of the active parameters, stacked ones (1, ...). The optimizer
        sees values in the dtypes of ``parts``; updates are applied to them as they are here.
      own: the state of the active parameters, ``layout.of(active)``, likewise.
      shared: the rest of the state, ``layout.shared``.

    Raises:
      ValueError: if what happens to one parameter depends on another one.
    """
    tx, apply_updates, parts, layout = optimizer
    lengths = {
        path: parts.length if i in parts.stacked else 1 for i, path in enumerate(parts.paths)
    }
    names = frozenset(parts.paths[i] for i in active)

    def update(index, G, W, S):
        as_declared = [w.astype(x.dtype) for w, x in zip(W, parts.of_one_layer, strict=True)]
        G, W, seen = map(parts.treedef.unflatten, (G, W, as_declared))
        state = layout.treedef.unflatten(S)
        with layer_view(LayerView(lengths, names, index)):
            U, new_state = tx.update(G, state, seen)
            new_params = apply_updates(W, U, state)
        if jax.tree.structure(new_state) != layout.treedef:
            raise ValueError("the optimizer's update returns a state of another structure")
        return jax.tree.leaves(new_params), jax.tree.leaves(new_state)

    at = [*layout.of(active), *layout.shared]
    arguments = (
        jnp.asarray(index, jnp.int32),
        _filled(parts.of_one_layer, active, G),
        _filled(parts.of_one_layer, active, W),
        _filled(layout.of_one_layer, at, [*own, *shared]),
    )
    jaxpr = jax.make_jaxpr(update)(*arguments)
    _check_independence(parts, layout, active, jaxpr)
    out = core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(arguments))
    new_params, new_state = out[: len(parts.paths)], out[len(parts.paths) :]
    return PartUpdate(
        [new_params[i] for i in active],
        [new_state[k] for k in layout.of(active)],
        [new_state[k] for k in layout.shared],
    )


def _filled(
    shapes: Sequence[jax.ShapeDtypeStruct], numbers: Sequence[int], values: Sequence[jax.Array]
) -> list[jax.Array]:
    """The values at their places, zeros elsewhere."""
    given = dict(zip(numbers, values, strict=True))
    return [given[i] if i in given else jnp.zeros(x.shape, x.dtype) for i, x in enumerate(shapes)]


def _check_independence(
    parts: Parts, layout: StateLayout, active: Sequence[int], jaxpr: core.ClosedJaxpr
) -> None:
    """Active outputs depend on active inputs alone, shared outputs on no parameter."""
    of_parameters = [1 << i for i in range(len(parts.paths))]
    of_state = [0 if owner is None else 1 << owner for owner in layout.owners]
    sources = sources_of_outputs(jaxpr, [0, *of_parameters, *of_parameters, *of_state])
    own = sum(1 << i for i in active)
    names = [*parts.paths, *(f"{path} of the optimizer's state" for path in layout.paths)]
    owners = [*range(len(parts.paths)), *layout.owners]
    for name, owner, found in zip(names, owners, sources, strict=True):
        foreign = found if owner is None else found & ~own if owner in active else 0
        if foreign:
            culprits = [path for i, path in enumerate(parts.paths) if foreign & (1 << i)]
            raise ValueError(
                f"{name} depends on {', '.join(culprits[:3])}{', ...' if culprits[3:] else ''}. "
                "per_layer updates one layer before the gradients of the others exist, so that "
                "what happens to a parameter must depend on that parameter and on the step alone. "
                "For optax.clip_by_global_norm give clip_norm to per_layer"
            )
