"""Update of some of the parameters by an optimizer of all parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from natgalore_jax._src.params.context import LayerView, layer_view
from natgalore_jax._src.params.dependence import sources_of_outputs
from natgalore_jax._src.per_layer.layer_parts import Parts
from natgalore_jax._src.per_layer.state_layout import StateLayout


class SplitOptimizer(NamedTuple):
    """An optimizer, and the layout of its parameters and its state."""

    tx: optax.GradientTransformationExtraArgs
    apply_updates: Callable[[Any, Any, Any], Any]  # (params, updates, opt_state) -> params
    parts: Parts
    layout: StateLayout


class PartUpdate(NamedTuple):
    """Result of an update, by leaf."""

    params: list[jax.Array]  # the active parameters
    own: list[jax.Array]  # state of the active parameters
    shared: list[jax.Array]  # state that belongs to no parameter


def update_part(
    optimizer: SplitOptimizer,
    active: Sequence[int],
    index: jax.typing.ArrayLike,
    G: Sequence[jax.Array],
    W: Sequence[jax.Array],
    own: Sequence[jax.Array],
    shared: Sequence[jax.Array],
) -> PartUpdate:
    """Run the optimizer on the tree of all parameters, with zeros for inactive parameters.

    The tree thereby matches masks, labels and schedules. No result depends on the zeros, and XLA
    removes their computations.

    Args:
      optimizer: of all parameters.
      active: numbers of the active parameters.
      index: number of the layer, for stacked parameters.
      G, W: gradients and values of the active parameters, (1, ...) if stacked. The optimizer
        receives values in the dtypes of ``parts``; updates are applied to the values given here.
      own: state of the active parameters, ``layout.of(active)``, one layer if stacked.
      shared: all other state, ``layout.shared``.

    Raises:
      ValueError: if the update of one parameter depends on another parameter.
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
    """The values at their positions, zeros elsewhere."""
    given = dict(zip(numbers, values, strict=True))
    return [given[i] if i in given else jnp.zeros(x.shape, x.dtype) for i, x in enumerate(shapes)]


def _check_independence(
    parts: Parts, layout: StateLayout, active: Sequence[int], jaxpr: core.ClosedJaxpr
) -> None:
    """Check that active outputs depend on active inputs only, shared outputs on no parameter."""
    of_parameters = [1 << i for i in range(len(parts.paths))]
    of_state = [0 if owner is None else 1 << owner for owner in layout.owners]
    sources = sources_of_outputs(jaxpr.jaxpr, [0, *of_parameters, *of_parameters, *of_state])
    own = sum(1 << i for i in active)
    names = [*parts.paths, *(f"{path} of the optimizer's state" for path in layout.paths)]
    owners = [*range(len(parts.paths)), *layout.owners]
    for name, owner, found in zip(names, owners, sources, strict=True):
        foreign = found if owner is None else found & ~own if owner in active else 0
        if foreign:
            culprits = [str(path) for i, path in enumerate(parts.paths) if foreign & (1 << i)]
            raise ValueError(
                f"{name} depends on {', '.join(culprits[:3])}{', ...' if culprits[3:] else ''}. "
                "per_layer updates one layer before the gradients of other layers exist, so that "
                "the update of a parameter must depend on that parameter and the step only. "
                "Instead of optax.clip_by_global_norm set clip_norm of per_layer"
            )
