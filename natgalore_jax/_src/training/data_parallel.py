"""Data-parallel training step that sums low-rank gradients over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from natgalore_jax._src.params.checks import check_integer
from natgalore_jax._src.params.where import KeyPath
from natgalore_jax._src.training.low_rank_steps import low_rank_steps

Step = Callable[[Any, optax.OptState, Any], tuple[Any, optax.OptState, jax.Array]]


def data_parallel_step(
    loss: Callable[[Any, Any], jax.Array],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    axis_name: str = "data",
    micro_batches: int = 1,
) -> Step:
    r"""Data-parallel training step that sums :math:`P^\top G` over devices instead of G.

    All devices have the same bases, and projection is linear:

    .. math:: P^\top \Bigl(\tfrac1D \sum_d G_d\Bigr) = \tfrac1D \sum_d P^\top G_d .

    The all-reduce of a matrix whose rows are projected has r × n instead of m × n numbers. Full
    gradients are summed for unprojected parameters, and for matrices that are due for a refresh: on
    average one in ``update_interval`` at each step, and all at the first step. The result equals
    the ordinary step with the mean gradient up to rounding.

    With ``micro_batches`` each device splits its rows and processes the parts one after another.
    Their low-rank gradients are averaged and summed over devices once; bases depend on the first
    part.

    Args:
      loss: ``(params, batch) -> scalar``, the mean over the rows of the batch.
      tx: an optimizer for :func:`.low_rank_steps`, without a residual, which needs the full mean
        gradient: :func:`.natural_galore_adamw` with ``residual="none"``, or :func:`.galore_adamw`.
        "online" refreshes every basis at every step, which sums full gradients.
      mesh: the devices. Axes other than ``axis_name`` are left to the compiler.
      axis_name: the mesh axis over which rows are sharded.
      micro_batches: number of parts of the rows of a device.

    Returns:
      ``step(params, state, batch) -> (params, state, loss)``, jitted. params and state are donated,
      and replicated over the axis. The leaves of the batch have rows on their first axis, a
      multiple of the number of devices times ``micro_batches``.

    Raises:
      TypeError, ValueError: as :func:`.low_rank_steps`; for an optimizer with a residual, an axis
        that is not in the mesh, and ``micro_batches`` below one; from ``step`` for another number
        of rows.

    Example:
      >>> import jax, jax.numpy as jnp, natgalore_jax as ng
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = ng.galore_adamw(0.1, rank=2)
      >>> loss = lambda params, x: jnp.mean((x @ params["w"] - x) ** 2)
      >>> step = ng.training.data_parallel_step(loss, tx, mesh)
      >>> params = {"w": jnp.zeros((8, 8))}
      >>> params, state, value = step(params, tx.init(params), jnp.ones((8, 8)))
      >>> float(value)
      1.0
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function (params, batch) -> scalar, got {loss!r}")
    steps = low_rank_steps(tx)
    check_integer("micro_batches", micro_batches, minimum=1)
    if axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name={axis_name!r} is not an axis of the mesh, {mesh.axis_names}")
    if steps.needs_full:
        raise ValueError(
            "data_parallel_step sums low-rank gradients over devices, and "
            "project_back(residual=...) needs the full mean gradient: use residual='none', or "
            "jax.jit of an ordinary step with a sharded batch"
        )
    sharded, replicated = PartitionSpec(axis_name), PartitionSpec()

    def on_one_device(params, state, batch):
        # JAX would sum full gradients of replicated parameters over devices: make them varying.
        own = jax.lax.pcast(params, axis_name, to="varying")
        if micro_batches == 1:
            value, grads = jax.value_and_grad(loss)(own, batch)
            state, low = steps.exchange(grads, state, axis_name)
        else:
            value, state, mean = by_micro_batch(own, state, batch)
            low = jax.lax.pmean(mean, axis_name)
        updates, state = steps.update(low, state, params)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(value, axis_name)

    def by_micro_batch(own, state, batch):
        def accumulate(carry, part):
            total, state, mean = carry
            position, batch = part
            value, grads = jax.value_and_grad(loss)(own, batch)
            state, mean = steps.accumulate(grads, state, mean, position, axis_name)
            return (total + value, state, mean), None

        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        like = jax.eval_shape(loss, own, jax.tree.map(lambda x: x[0], parts))
        wide = jnp.promote_types(like.dtype, jnp.float32)
        total = jax.lax.pcast(jnp.zeros([], wide), axis_name, to="varying")
        inputs = (jnp.arange(micro_batches), parts)
        start = (total, state, steps.empty_mean(own, state))
        (total, state, mean), _ = jax.lax.scan(accumulate, start, inputs)
        mean_loss = (total / micro_batches).astype(like.dtype)
        return mean_loss, state, optax.tree.cast_like(mean, own)

    sharded_step = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(replicated, replicated, sharded),
        out_specs=(replicated, replicated, replicated),
        axis_names={axis_name},
    )

    divisor = mesh.shape[axis_name] * micro_batches

    def step(params, state, batch):
        for path, x in jax.tree_util.tree_leaves_with_path(batch):
            if not jnp.ndim(x) or jnp.shape(x)[0] % divisor:
                raise ValueError(
                    f"{KeyPath(path)} of the batch needs rows on its first axis, a multiple of "
                    f"{mesh.shape[axis_name]} devices times {micro_batches} micro-batches, got "
                    f"shape {jnp.shape(x)}"
                )
        # On a mesh with explicit axes shard_map requires inputs that are sharded already.
        return sharded_step(params, state, jax.device_put(batch, NamedSharding(mesh, sharded)))

    return jax.jit(step, donate_argnums=(0, 1))
