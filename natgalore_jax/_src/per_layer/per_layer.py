"""Training step with the gradient of one layer at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.low_bits.weights import (
    QuantizedWeights,
    decoded,
    read_weight,
    weight_leaves,
    with_weight_leaves,
    write_weight,
)
from natgalore_jax._src.params.checks import (
    check_choice,
    check_float_dtype,
    check_integer,
    check_number,
    check_transformation,
    check_unused,
)
from natgalore_jax._src.per_layer.accumulate import accumulated
from natgalore_jax._src.per_layer.backward import Functions, start_backward
from natgalore_jax._src.per_layer.layer_parts import Selector, put_layer, split_params, take_layer
from natgalore_jax._src.per_layer.part_update import SplitOptimizer, update_part
from natgalore_jax._src.per_layer.state_layout import StateLayout, state_layout
from natgalore_jax._src.training.in_place import in_place
from natgalore_jax._src.training.offload import stored_like, to_device

CLIP_MODES = ("previous", "layer")


class PerLayerState(NamedTuple):
    """State of :func:`.per_layer`."""

    opt_state: Any  #: ``tx.init`` of all parameters, with stacked layers
    grad_norm: jax.Array  #: shape (), float32: norm of the last gradient, 0 before the first step


class PerLayerMetrics(NamedTuple):
    """Measurements of a step of :func:`.per_layer`, before any update."""

    loss: jax.Array  #: shape (), from ``head``
    grad_norm: jax.Array  #: shape (), float32: of the unclipped gradient of all parameters


class PerLayer(NamedTuple):
    """Result of :func:`.per_layer`."""

    init: Callable[[Any], PerLayerState]  #: ``params -> state``
    #: ``(params, state, batch) -> (params, state, metrics)``; jitted, donates params and state.
    step: Callable[[Any, PerLayerState, Any], tuple[Any, PerLayerState, PerLayerMetrics]]


def per_layer(
    tx: optax.GradientTransformation,
    embed: Callable[[Any, Any], Any],
    layer: Callable[[Any, Any], Any],
    head: Callable[[Any, Any, Any], jax.Array],
    layers: Selector = "layers",
    clip_norm: float | None = None,
    clip_mode: str = "previous",
    accumulate: int = 1,
    apply_updates: Callable[[Any, Any, Any], Any] | None = None,
    weight_dtype: Any = None,
) -> PerLayer:
    r"""Training step that updates each layer within the backward pass.

    The model is

    .. math:: x_0 = \mathrm{embed}(W, b), \quad x_{l+1} = \mathrm{layer}(W_l, x_l), \quad
      \mathrm{loss} = \mathrm{head}(W, x_L, b)

    with the parameters of its L layers stacked, (L, ...). The forward pass keeps the input of each
    layer. The backward pass recomputes each layer from its input, from the last layer to the first,
    and updates its weights and optimizer state in place as soon as its gradient is computed. The
    peak memory includes gradients and updates of one layer only, or of the embedding or the head if
    that is larger. docs/per_layer.md has measurements.

    Results equal the ordinary step, ``tx.update`` of all gradients, up to rounding: refreshes fall
    on the same matrices at the same steps, and counters count once per step. ``state.opt_state``
    has the structure of ``tx.init(params)``, so that either step can continue from the other.

    The update of one layer must not depend on the gradients of other layers, which is checked when
    the step is traced. The check cannot see inside a stacked parameter: a norm over all layers
    (``optax.scale_by_trust_ratio``, Adafactor's clipping) becomes a norm of each layer, and random
    numbers (``optax.add_noise``) are the same in all layers.

    Args:
      tx: any Optax transformation.
      embed: ``(params, batch) -> x``, the input of the first layer. ``params`` is the tree of all
        parameters, with ``jax.ShapeDtypeStruct`` instead of stacked parameters.
      layer: ``(layer_params, x) -> x``, one layer. ``layer_params`` is the subtree ``layers``
        without the leading axis. x is any pytree; leaves that are not floating-point (masks,
        positions, a random key, the number of the layer) pass through and may change.
      head: ``(params, x, batch) -> loss``, a scalar. Parameters that ``embed`` uses too are tied:
        their gradient is the sum of both.
      layers: selects the stacked parameters: a key or attribute of ``params``, or a function
        ``params -> subtree``.
      clip_norm: c; gradients are multiplied by ``min(1, c / norm)``. None: no clipping.
      clip_mode: which norm. The norm of the whole gradient is known only after the updates:
        ``"previous"`` uses the norm of the last step (the first step is not clipped); ``"layer"``
        clips each layer by its own norm, and the embedding (with tied parameters) and the head by
        theirs. A non-finite previous norm clips nothing; gradients of one layer whose squares
        overflow become zero, as with ``optax.clip_by_global_norm``.
      accumulate: micro-batches in one step. ``step`` takes one micro-batch; parameters change at
        the last micro-batch of a step. Low-rank gradients are accumulated as with
        :func:`.low_rank_steps` (``opt_state`` is an :class:`.AccumulatedState`): the optimizer must
        come from :func:`.chain`, without a residual. To accumulate full gradients instead, pass
        ``optax.MultiSteps(tx, k)`` as ``tx``. Clipping and metrics are per micro-batch.
      apply_updates: ``(params, updates, opt_state) -> params`` with the state before the step,
        instead of ``optax.apply_updates``; for bfloat16 parameters, for example,
        ``lambda params, updates, state: ng.training.apply_updates_stochastic(params, updates,
        state[0].count)``.
      weight_dtype: for parameters in 8 bits (:func:`.quantize_weights`) only: the dtype of decoded
        weights and gradients for model and optimizer, one layer at a time; None is float32. Updates
        are always added to the exact weights in float32, also by ``apply_updates``, and then
        rounded stochastically.

    Returns:
      A :class:`.PerLayer` of ``init`` and ``step``. ``step`` is jitted and donates parameters and
      state: do not use them again.

    Raises:
      TypeError, ValueError: for an argument of a wrong type or value; at ``init`` and ``step`` for
        parameters without a stack, for ``weight_dtype`` with parameters that are not in 8 bits, for
        an optimizer that treats a stack differently from its layers (a layer axis in a matrix that
        is projected, clipped or normalised), and for an optimizer that mixes parameters, such as
        ``optax.clip_by_global_norm``.

    References:
      Lv et al., Full parameter fine-tuning for large language models with limited resources (2023),
      for updates within the backward pass; GaLore (2024) for updates per layer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> params = {
      ...     "embed": jax.random.normal(keys[0], (4, 16)) / 2,
      ...     "layers": {"kernel": jax.random.normal(keys[1], (3, 16, 16)) / 4},
      ...     "head": jax.random.normal(keys[2], (16, 1)) / 4,
      ... }
      >>> x = jax.random.normal(keys[3], (64, 4))
      >>> batch = {"x": x, "y": jnp.sin(x[:, :1] * x[:, 1:2])}
      >>> train = ng.training.per_layer(
      ...     ng.natural_galore_adamw(optax.linear_schedule(0.02, 0.0, 100), rank=4),
      ...     embed=lambda params, batch: batch["x"] @ params["embed"],
      ...     layer=lambda layer, x: x + jnp.tanh(x @ layer["kernel"]),
      ...     head=lambda params, x, batch: jnp.mean((x @ params["head"] - batch["y"]) ** 2),
      ... )
      >>> state, losses = train.init(params), []
      >>> for _ in range(100):
      ...     params, state, metrics = train.step(params, state, batch)
      ...     losses.append(metrics.loss)
      >>> bool(losses[-1] < 0.1 * losses[0])
      True
    """
    if apply_updates is None:
        apply_updates = _apply_updates
    functions = {"embed": embed, "layer": layer, "head": head, "apply_updates": apply_updates}
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {function!r}")
    check_transformation("tx", tx)
    if not (isinstance(layers, str) or callable(layers)):
        raise TypeError(f"layers must be a name or a function of the parameters, got {layers!r}")
    if clip_norm is not None:
        check_number("clip_norm", clip_norm, above=0.0)
    check_choice("clip_mode", clip_mode, CLIP_MODES)
    if clip_norm is None:
        check_unused("clip_mode", clip_mode, "previous", "without clip_norm")
    check_integer("accumulate", accumulate, minimum=1)
    check_float_dtype("weight_dtype", weight_dtype)
    settings = _Settings(
        optax.with_extra_args_support(tx if accumulate == 1 else accumulated(tx, accumulate)),
        apply_updates,
        Functions(embed, layer, head),
        layers,
        clip_norm,
        clip_mode,
        weight_dtype,
    )

    # Under jit XLA removes the decoding of weights whose values init does not use.
    init_from_codes = jax.jit(
        lambda params: settings.tx.init(decoded(to_device(params), weight_dtype))
    )

    def init(params):
        state_layout(settings.tx, split_params(params, layers, weight_dtype))  # for its errors
        if isinstance(params, QuantizedWeights):
            opt_state = init_from_codes(params)
        else:
            opt_state = settings.tx.init(to_device(params))
        _, opt_state = _distinct((params, opt_state))
        return PerLayerState(opt_state, jnp.zeros([], jnp.float32))

    def step(params, state, batch):
        return _step(settings, params, state, batch)

    return PerLayer(init, in_place(step, 2))


class _Settings(NamedTuple):
    tx: optax.GradientTransformationExtraArgs
    apply_updates: Callable[[Any, Any, Any], Any]
    model: Functions
    layers: Selector
    clip_norm: float | None
    clip_mode: str
    weight_dtype: Any


def _step(
    settings: _Settings, params: Any, state: PerLayerState, batch: Any
) -> tuple[Any, PerLayerState, PerLayerMetrics]:
    parts = split_params(params, settings.layers, settings.weight_dtype)
    layout = state_layout(settings.tx, parts)
    _, W = weight_leaves(params)
    count = params.count if isinstance(params, QuantizedWeights) else 0
    S = _state_leaves(layout, state.opt_state)
    shared = to_device([S[k] for k in layout.shared])
    optimizer = SplitOptimizer(settings.tx, settings.apply_updates, parts, layout)
    backward = start_backward(settings.model, parts, W, batch)

    def update(active, index, G, W, own):
        squared = sum(
            (jnp.sum(jnp.square(g.astype(jnp.float32))) for g in G), jnp.zeros([], jnp.float32)
        )
        G = _clipped(settings, G, squared, state.grad_norm)
        exact = [read_weight(w, jnp.float32) for w in W]
        new = update_part(optimizer, active, index, G, exact, own, shared)
        stored = [
            write_weight(x, w, count, i, index)
            for i, x, w in zip(active, new.params, W, strict=True)
        ]
        return stored, new, squared

    def update_now(active, G):
        own = layout.of(active)
        w, states = to_device(([W[i] for i in active], [S[k] for k in own]))
        stored, new, squared = update(active, 0, G, w, states)
        _assign(W, active, stored)
        _assign(S, own, new.own)
        return new.shared, squared

    stacked, of_layers = parts.stacked, layout.of(parts.stacked)
    axes = [layout.layer_axes[k] or 0 for k in of_layers]
    dtypes = [parts.shapes[i].dtype for i in stacked]

    def update_layer(k, carry):
        stack, states, dx, squared = carry
        index = parts.length - 1 - k
        w = [take_layer(a, index) for a in stack]
        own = [take_layer(a, index, axis) for a, axis in zip(states, axes, strict=True)]
        G, dx = backward.layer(
            index, [read_weight(a, t) for a, t in zip(w, dtypes, strict=True)], dx
        )
        stored, new, of_layer = update(stacked, index, G, w, own)
        stack = [put_layer(a, b, index) for a, b in zip(stack, stored, strict=True)]
        states = [
            put_layer(a, b, index, axis) for a, b, axis in zip(states, new.own, axes, strict=True)
        ]
        return stack, states, dx, squared + of_layer

    _, of_head = update_now(backward.early, backward.early_gradients)
    # Stacks in the carry are updated in place; as inputs and outputs of a scan they are copied.
    carry = ([W[i] for i in stacked], [S[k] for k in of_layers], backward.dx, of_head)
    stack, states, dx, squared = jax.lax.fori_loop(0, parts.length, update_layer, carry)
    _assign(W, stacked, stack)
    _assign(S, of_layers, states)
    new_shared, of_embedding = update_now(backward.late, backward.embed(dx))
    _assign(S, layout.shared, new_shared)

    grad_norm = jnp.sqrt(squared + of_embedding)
    new_state = PerLayerState(layout.treedef.unflatten(S), grad_norm)
    return with_weight_leaves(params, W), new_state, PerLayerMetrics(backward.loss, grad_norm)


def _apply_updates(params: Any, updates: Any, opt_state: Any) -> Any:
    del opt_state
    return optax.apply_updates(params, updates)


def _distinct(tree: Any) -> Any:
    """Copy repeated arrays of a tree, because no buffer can be donated twice."""
    leaves, treedef = jax.tree.flatten(tree)
    seen: set[int] = set()
    for i, leaf in enumerate(leaves):
        is_repeated = id(leaf) in seen and isinstance(leaf, jax.Array)
        leaves[i] = jnp.copy(leaf) if is_repeated else leaf
        seen.add(id(leaf))
    return treedef.unflatten(leaves)


def _state_leaves(layout: StateLayout, opt_state: Any) -> list[Any]:
    leaves, treedef = jax.tree.flatten(opt_state)
    if treedef != layout.treedef or any(
        jnp.shape(x) != y.shape for x, y in zip(leaves, layout.shapes, strict=True)
    ):
        raise ValueError(
            "the state must come from init of the same per_layer, for parameters of these shapes: "
            "the optimizer's state has another structure or other shapes"
        )
    return leaves


@own_arithmetic
def _clipped(
    settings: _Settings, G: Sequence[jax.Array], squared: jax.Array, last_norm: jax.Array
) -> list[jax.Array]:
    if settings.clip_norm is None:
        return list(G)
    is_previous = settings.clip_mode == "previous"
    norm = last_norm if is_previous else jnp.sqrt(squared)
    exceeds = norm > settings.clip_norm
    if is_previous:  # of other gradients, which may be finite
        exceeds &= jnp.isfinite(norm)
    factor = jnp.where(exceeds, settings.clip_norm / jnp.where(exceeds, norm, 1.0), 1.0)
    return [(g * factor).astype(g.dtype) for g in G]


def _assign(leaves: list[Any], numbers: Sequence[int], values: Sequence[Any]) -> None:
    for number, value in zip(numbers, values, strict=True):
        leaves[number] = jax.tree.map(stored_like, value, leaves[number])
