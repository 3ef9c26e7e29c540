"""State and weights in the memory of the host, fetched while they are needed."""

from typing import Any

import jax
import optax

from natgalore_jax._src.params.checks import check_integer


def to_host(tree: Any, min_size: int = 4096) -> Any:
    """The tree with its large arrays in the memory of the host.

    They keep their sharding: every host holds what its devices had. Works under ``jax.jit`` too.
    :func:`.per_layer` takes weights that are there, and fetches one layer of them at a time.

    Args:
      tree: arrays, of any dtype.
      min_size: elements; smaller arrays stay. A copy has a latency whatever its size.

    Returns:
      The same tree; :func:`.to_device` is the inverse.

    Raises:
      TypeError, ValueError: if ``min_size`` is not a positive integer.
      NotImplementedError: on a CPU before jax 0.10.2, which has no separate memory of the host.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as ng
      >>> tree = ng.training.to_host({"w": jnp.ones((128, 64)), "b": jnp.ones(64)})
      >>> tree["w"].sharding.memory_kind, tree["b"].sharding.memory_kind
      ('pinned_host', 'device')
    """
    check_integer("min_size", min_size, minimum=1)
    # There device_put leaves arrays where they are, and says nothing.
    if jax.default_backend() == "cpu" and jax.__version_info__ < (0, 10, 2):
        raise NotImplementedError(
            f"arrays in host memory need jax 0.10.2 or newer on a CPU, found jax {jax.__version__}"
        )
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Host) if x.size >= min_size else x, tree
    )


def to_device(tree: Any) -> Any:
    """The tree in the memory of the devices. What is there already is not copied.

    Args:
      tree: arrays, of any dtype, in either memory.

    Returns:
      The same tree; :func:`.to_host` is the inverse.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tree = ng.training.to_device(ng.training.to_host({"w": jnp.ones((128, 64))}))
      >>> tree["w"].sharding.memory_kind
      'device'
    """
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x, tree
    )


def offload_state(
    inner: optax.GradientTransformation, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """``inner`` with its large arrays in the memory of the host between steps.

    ``update`` fetches them, runs ``inner.update`` and stores them again: the numbers are those of
    ``inner``. Compiled together with the backward pass, XLA decides when each array travels; the
    devices hold all of the state at once at most. With :func:`.per_layer` around it they hold
    the state of one layer, and the rest travels while other layers are computed.

    Between the host and a device lie 10 to 60 GB/s: 5.7 GB of state, there and back, take 0.2 to
    1.1 seconds of each step.

    Args:
      inner: any transformation, that of a whole optimizer or of a part.
      min_size: elements; smaller arrays of the state stay on the devices, as counts have to.

    Returns:
      A transformation with the state of ``inner``. A step that donates it is jitted by
      :func:`.in_place`, or by ``jax.jit`` with the ``out_shardings`` of everything.

    Raises:
      TypeError, ValueError: if ``min_size`` is not a positive integer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> params = {"w": jnp.ones((128, 64))}
      >>> tx = ng.training.offload_state(optax.adam(0.1))
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> state[0].mu["w"].sharding.memory_kind, updates["w"].sharding.memory_kind
      ('pinned_host', 'device')
    """
    check_integer("min_size", min_size, minimum=1)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return to_host(inner.init(params), min_size)

    def update_fn(updates, state, params=None, **extra_args):
        updates, new_state = inner.update(updates, to_device(state), params, **extra_args)
        return updates, jax.tree.map(stored_like, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stored_like(x: Any, old: Any) -> Any:
    """x in the memory that ``old`` is in."""
    return jax.device_put(x, jax.memory.Space.Host) if _is_on_host(old) else x


def _is_on_host(x: Any) -> bool:
    return getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host
