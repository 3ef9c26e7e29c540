"""``jax.jit`` with donation that preserves shardings and memory kinds."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding

from natgalore_jax._src.params.checks import check_integer
from natgalore_jax._src.training.offload import home_of, is_committed, is_on_host


class InPlace:
    """Result of :func:`.in_place`, used like a function of ``jax.jit``."""

    def __init__(self, step: Callable[..., Any], number: int):
        self._step, self._number = step, number
        self._on_device = jax.jit(step, donate_argnums=tuple(range(number)))
        self._placed: dict[Any, Any] = {}  # by the shardings of the new state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(args)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        return self._jitted(args).lower(*args, **kwargs)

    def _jitted(self, args: tuple) -> Any:
        leaves, treedef = jax.tree.flatten(args[: self._number])
        # Inside another jitted function the step is inlined and donates nothing.
        arrays = [x for x in leaves if not isinstance(x, jax.core.Tracer)]
        shardings = [getattr(x, "sharding", None) for x in leaves]
        on_mesh = [s for s in shardings if isinstance(s, NamedSharding)]
        # Without out_shardings XLA shards the new state of automatic axes as it likes, and jax.jit
        # may give an output a donated buffer in the other memory: the program crashes.
        if len(arrays) < len(leaves) or not (on_mesh or any(map(is_on_host, arrays))):
            return self._on_device
        first = next(filter(None, shardings))
        result_at = home_of(arrays) or SingleDeviceSharding(*first.device_set)
        # Arrays on one device, such as counts, go to the mesh of the others, uncommitted ones to
        # their device.
        given = tuple(
            result_at
            if isinstance(s, SingleDeviceSharding) and (on_mesh or not is_committed(x))
            else s
            for x, s in zip(leaves, shardings, strict=True)
        )
        if (treedef, given) not in self._placed:
            self._placed[treedef, given] = jax.jit(
                self._step,
                donate_argnums=tuple(range(self._number)),
                out_shardings=(*treedef.unflatten(given), result_at),
            )
        return self._placed[treedef, given]


def in_place(step: Callable[..., Any], number: int = 1) -> InPlace:
    """``jax.jit`` of a training step with donated state, also in host memory.

    Args:
      step: ``(*state, *rest) -> (*state, result)``, with the same trees, shapes and dtypes in
        ``state``; ``result`` is any tree of small arrays, such as metrics.
      number: the number of arguments that are ``state``, given by position. They are donated: do
        not use them again.

    Returns:
      The jitted step. The new state has the shardings and memory kinds of the old state. ``result``
      is on the devices, replicated on a mesh.

    Raises:
      TypeError, ValueError: if ``number`` is not a positive integer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> tx = ng.training.offload_state(optax.adam(0.1))
      >>> def step(params, state, batch):
      ...     loss, grads = jax.value_and_grad(lambda w: jnp.mean((batch @ w) ** 2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state, loss
      >>> step = ng.training.in_place(step, 2)
      >>> params = jnp.ones((64, 64))
      >>> params, state, loss = step(params, tx.init(params), jnp.ones((8, 64)))
      >>> params.sharding.memory_kind, state[0].mu.sharding.memory_kind
      ('device', 'pinned_host')
    """
    check_integer("number", number, minimum=1)
    return InPlace(step, number)
