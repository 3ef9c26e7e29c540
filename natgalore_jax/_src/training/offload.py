"""State and weights in host memory, fetched to the devices when needed."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, SingleDeviceSharding

from natgalore_jax._src.params.checks import check_integer, check_transformation
from natgalore_jax._src.params.context import current_subspace
from natgalore_jax._src.params.where import shape_and_dtype


def to_host(tree: Any, min_size: int = 4096) -> Any:
    """Move the large arrays of a tree to host memory.

    Arrays keep their sharding: every host has the shards of its devices. It works under ``jax.jit``
    too. :func:`.per_layer` accepts weights in host memory, and fetches one layer at a time.

    Args:
      tree: arrays, of any dtype, and numbers.
      min_size: elements; smaller arrays stay on the devices, because a copy has a fixed latency.

    Returns:
      The same tree; :func:`.to_device` is the inverse.

    Raises:
      TypeError, ValueError: if ``min_size`` is not a positive integer, and for a leaf that is no
        array.
      NotImplementedError: on a CPU before jax 0.10.2, which has no separate host memory.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as ng
      >>> tree = ng.training.to_host({"w": jnp.ones((128, 64)), "b": jnp.ones(64)})
      >>> tree["w"].sharding.memory_kind, tree["b"].sharding.memory_kind
      ('pinned_host', 'device')
    """
    check_integer("min_size", min_size, minimum=1)
    # Older CPU backends silently ignore the memory kind.
    if jax.default_backend() == "cpu" and jax.__version_info__ < (0, 10, 2):
        raise NotImplementedError(
            f"arrays in host memory need jax 0.10.2 or newer on a CPU, found jax {jax.__version__}"
        )

    def stored(path, x):
        is_large = shape_and_dtype(path, x).size >= min_size
        return jax.device_put(x, jax.memory.Space.Host) if is_large else x

    return jax.tree.map_with_path(stored, tree)


def to_device(tree: Any) -> Any:
    """Move the arrays of a tree to device memory; arrays on the devices are not copied.

    Args:
      tree: arrays, of any dtype, in host or device memory.

    Returns:
      The same tree; :func:`.to_host` is the inverse.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tree = ng.training.to_device(ng.training.to_host({"w": jnp.ones((128, 64))}))
      >>> tree["w"].sharding.memory_kind
      'device'
    """
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x, tree
    )


def offload_state(
    inner: optax.GradientTransformation, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """Keep the large arrays of the state of ``inner`` in host memory between steps.

    ``update`` fetches them, runs ``inner.update`` and stores them again, with the same numbers as
    ``inner``. In one program with the backward pass, XLA schedules the copies, and the peak on the
    devices includes at most the whole state. Inside :func:`.per_layer` it includes the state of one
    layer, and copies overlap with the computation of other layers.

    The bandwidth between host and device is 10 to 60 GB/s: 5.7 GB of state take 0.1 to 0.6 seconds
    each way, in each step.

    Args:
      inner: any transformation, a whole optimizer or a part, but not a part inside a subspace,
        whose states a refresh transports on the devices: put it around the whole chain.
      min_size: elements; smaller arrays of the state, such as counts, stay on the devices.

    Returns:
      A transformation with the state of ``inner``. Jit a step that donates the state by
      :func:`.in_place`, or by ``jax.jit`` with ``out_shardings`` for all outputs.

    Raises:
      TypeError, ValueError: if ``min_size`` is not a positive integer; at ``init`` inside a
        subspace.

    Example:
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> params = {"w": jnp.ones((128, 64))}
      >>> tx = ng.training.offload_state(optax.adam(0.1))
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> state[0].mu["w"].sharding.memory_kind, updates["w"].sharding.memory_kind
      ('pinned_host', 'device')
    """
    check_integer("min_size", min_size, minimum=1)
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        if current_subspace() is not None:
            raise ValueError(
                "offload_state is inside a subspace, whose states a refresh transports on the "
                "devices: put it around the whole chain, offload_state(natgalore_jax.chain(...))"
            )
        state, home = inner.init(params), home_of(jax.tree.leaves(params))
        if home is not None:  # In host memory an array stays on the device where it was made.
            state = jax.tree.map(lambda x: x if is_committed(x) else jax.device_put(x, home), state)
        return to_host(state, min_size)

    def update_fn(updates, state, params=None, **extra_args):
        updates, new_state = inner.update(updates, to_device(state), params, **extra_args)
        return updates, jax.tree.map(stored_like, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def home_of(leaves: Sequence[Any]) -> jax.sharding.Sharding | None:
    """Sharding for uncommitted arrays of the same program: replicated on the mesh of the committed
    ones, or their device; None if none is committed."""
    found = [x.sharding for x in leaves if is_committed(x) and not isinstance(x, jax.core.Tracer)]
    on_mesh = [s for s in found if isinstance(s, NamedSharding)]
    first = next(iter(on_mesh or found), None)
    if isinstance(first, NamedSharding):
        return NamedSharding(first.mesh, jax.P())
    return None if first is None else SingleDeviceSharding(*first.device_set)


def is_committed(x: Any) -> bool:
    """Whether an array stays on its devices; a traced one is where its program puts it."""
    return isinstance(x, jax.core.Tracer) or getattr(x, "committed", False)


def stored_like(x: Any, old: Any) -> Any:
    """Put x in the memory of ``old``."""
    return jax.device_put(x, jax.memory.Space.Host) if is_on_host(old) else x


def is_on_host(x: Any) -> bool:
    """Whether an array, a traced array or a ``jax.ShapeDtypeStruct`` is in host memory."""
    if isinstance(x, jax.core.Tracer):
        return host_kind(jax.typeof(x)) is not None
    # The type of an array may say "device" of an array in host memory; its sharding does not.
    return getattr(getattr(x, "sharding", None), "memory_kind", None) == "pinned_host"


def host_kind(kind: Any) -> str | None:
    """Memory kind of a type of arrays in host memory, None of others."""
    is_host = getattr(kind, "memory_space", None) == jax.memory.Space.Host
    return "pinned_host" if is_host else None
