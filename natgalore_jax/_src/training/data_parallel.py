"""A training step in which devices exchange low-rank gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from natgalore_jax._src.params.checks import check_integer
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

    So r × n numbers are summed over the devices in the place of m × n for each matrix whose rows
    are projected. A matrix whose basis is due at this step is exchanged as a whole, once: on
    average one in ``update_interval`` (all of them at the first step). Parameters that are not
    projected are exchanged in full. The numbers are those of the ordinary step with the mean
    gradient, to float error.

    With ``micro_batches`` the rows of each device are taken in so many parts, one after another;
    their low-rank gradients are averaged first and exchanged once, and bases follow the first part.

    Args:
      loss: ``(params, batch) -> scalar``, the mean over the rows of the batch.
      tx: an optimizer for :func:`.low_rank_steps`, without a residual: the residual needs the mean
        of the whole gradients, so that nothing would be saved. ``residual="none"`` of
        :func:`natural_galore_adamw`; :func:`galore_adamw` has none. "online" refreshes every basis
        at every step, and saves nothing either.
      mesh: the devices. Axes other than ``axis_name`` are left to the compiler.
      axis_name: the axis of the mesh that rows are divided over.
      micro_batches: parts that the rows of a device are taken in.

    Returns:
      ``step(params, state, batch) -> (params, state, loss)``, jitted; params and state are donated.
      They are replicated over the axis. The leaves of the batch have rows on their first axis, a
      multiple of the number of devices times ``micro_batches``.

    Raises:
      TypeError, ValueError: as :func:`.low_rank_steps`; for an optimizer with a residual, an axis
        that the mesh does not have, and ``micro_batches`` below one.

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
    steps = low_rank_steps(tx)
    check_integer("micro_batches", micro_batches, minimum=1)
    if axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name={axis_name!r} is no axis of the mesh, {mesh.axis_names}")
    if steps.needs_full:
        raise ValueError(
            "data_parallel_step exchanges low-rank gradients, and project_back(residual=...) needs "
            "the mean of the whole ones: make the optimizer with residual='none', or let jax.jit "
            "share an ordinary step"
        )
    rows, same = PartitionSpec(axis_name), PartitionSpec()

    def on_one_device(params, state, batch):
        # Gradients of replicated parameters would be summed over the devices, in full.
        own = jax.lax.pcast(params, axis_name, to="varying")
        if micro_batches == 1:
            value, grads = jax.value_and_grad(loss)(own, batch)
            state, low = steps.exchange(grads, state, axis_name)
        else:
            value, state, mean = in_parts(own, state, batch)
            low = jax.lax.pmean(mean, axis_name)
        updates, state = steps.update(low, state, params)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(value, axis_name)

    def in_parts(own, state, batch):
        def take(carry, part):
            total, state, mean = carry
            position, batch = part
            value, grads = jax.value_and_grad(loss)(own, batch)
            state, mean = steps.accumulate(grads, state, mean, position, axis_name)
            return (total + value, state, mean), None

        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        nothing = optax.tree.zeros_like(steps.project(own, state))
        like = jax.eval_shape(loss, own, jax.tree.map(lambda x: x[0], parts))
        total = jax.lax.pcast(jnp.zeros([], like.dtype), axis_name, to="varying")
        carry, _ = jax.lax.scan(take, (total, state, nothing), (jnp.arange(micro_batches), parts))
        total, state, mean = carry
        return total / micro_batches, state, mean

    shared = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(same, same, rows),
        out_specs=(same, same, same),
        axis_names={axis_name},
    )

    def step(params, state, batch):
        # On a mesh with explicit axes shard_map takes nothing that is not divided yet.
        return shared(params, state, jax.device_put(batch, NamedSharding(mesh, rows)))

    return jax.jit(step, donate_argnums=(0, 1))
