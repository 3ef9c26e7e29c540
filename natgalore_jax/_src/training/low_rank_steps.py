"""An update in three steps, to sum low-rank gradients over micro-batches or devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.params.placement import AxisName
from natgalore_jax._src.subspace.chain import Chain, check_states, update_members
from natgalore_jax._src.subspace.subspace import Subspace


class LowRankSteps(NamedTuple):
    """The parts of an update; result of :func:`.low_rank_steps`."""

    #: ``(grads, state, axis_name=None, is_scheduled=True) -> state``: refresh of the matrices that
    #: are due for it; with ``is_scheduled=False`` only matrices without a gradient so far are due,
    #: at any micro-batch.
    refresh: Callable[..., optax.OptState]
    #: ``(grads, state) -> low``: R where a parameter is projected, elsewhere the gradient itself.
    project: Callable[[Any, optax.OptState], Any]
    #: ``(low, state, params, full=None, **extra_args) -> (updates, state)``: the other steps of the
    #: update.
    update: Callable[..., tuple[Any, optax.OptState]]
    #: Whether update needs the full gradient ``full``, for a residual.
    needs_full: bool

    def exchange(
        self, grads: Any, state: optax.OptState, axis_name: AxisName
    ) -> tuple[optax.OptState, Any]:
        """Refresh, and average low-rank gradients over devices with different gradients.

        Full gradients are summed only for matrices that are due for a refresh, on average one in
        ``update_interval`` at each step. For use within ``jax.shard_map`` or ``jax.pmap``;
        :func:`.data_parallel_step` is the whole training step.

        Args:
          grads: of the mean loss of this device's rows, whose number is the same on all devices.
          state: of the optimizer, the same on all devices.
          axis_name: of the devices; one mesh axis or a tuple of several.

        Returns:
          The refreshed state, and the low-rank tree of the mean gradient for ``update``, both the
          same on all devices.
        """
        state = self.refresh(grads, state, axis_name=axis_name)
        return state, jax.lax.pmean(self.project(grads, state), axis_name)

    def empty_mean(self, params: Any, state: optax.OptState) -> Any:
        """The mean of no gradients for ``accumulate``: zeros, in float32 at least.

        A mean in bfloat16 loses what is below its spacing: of 512 micro-batches it is off by 2 %,
        and what only the first has counts one and a half times.
        """

        def zeros(x):
            return jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32))

        return jax.tree.map(zeros, self.project(params, state))

    def accumulate(
        self,
        grads: Any,
        state: optax.OptState,
        mean: Any,
        position: jax.typing.ArrayLike,
        axis_name: AxisName | None = None,
    ) -> tuple[optax.OptState, Any]:
        """Add the gradient of one micro-batch to the mean low-rank gradient of a step.

        Args:
          grads: of this micro-batch.
          state: of the optimizer. The first micro-batch of a step refreshes it; the first refresh
            of a matrix may be at any micro-batch.
          mean: of the low-rank gradients of this step so far, at first ``empty_mean``. Its dtypes
            stay, whatever the dtypes of the gradients.
          position: number of micro-batches so far, int32; at 0 the old mean is ignored.
          axis_name: of devices with different gradients. Bases are computed from the mean gradient
            of the first micro-batch over all devices; each device has its own mean.

        Returns:
          The new state and mean. After the last micro-batch pass the mean, in the dtypes of the
          gradients, to ``update``, or with ``axis_name`` its ``jax.lax.pmean``.
        """
        state = self.refresh(grads, state, axis_name=axis_name, is_scheduled=position == 0)
        return state, _mean(position, mean, self.project(grads, state))


@own_arithmetic
def _mean(position: jax.typing.ArrayLike, mean: Any, new: Any) -> Any:
    """Mean of ``mean`` over ``position`` trees and one more tree, in the dtypes of ``mean``."""

    def averaged(m, x):
        return jnp.where(position == 0, x, m + (x - m) / (position + 1)).astype(jnp.result_type(m))

    return jax.tree.map(averaged, mean, new)


def low_rank_steps(tx: optax.GradientTransformation) -> LowRankSteps:
    r"""Split the update of an optimizer, to sum low-rank gradients in between.

    For ``steps = low_rank_steps(tx)``

    .. code-block:: python

      state = steps.refresh(grads, state)                 # P ← P', transport of state
      low = steps.project(grads, state)                   # R = PᵀG
      updates, state = steps.update(low, state, params)   # U = α P N(R), later transformations

    equals ``updates, state = tx.update(grads, state, params)``. ``project`` is linear in the
    gradient, so that sums and means of gradients can be computed exactly from R:

    * Gradient accumulation: ``refresh`` with the gradient of the first micro-batch, which
      determines the basis of the whole step; ``project`` each micro-batch's gradient and average
      the results (``accumulate`` does both); one ``update``. The accumulator has the size of R, r/m
      of the size of G for a matrix whose m rows are projected, and the inner optimizer runs once
      per step. (``optax.MultiSteps`` inside the chain has the small accumulator too, but runs the
      other transformations for each micro-batch.)
    * Data parallelism: sum R instead of G over devices, see ``exchange`` and
      :func:`.data_parallel_step`.

    Call ``refresh`` exactly once before each ``update``, at every step: it follows the schedule of
    refreshes but leaves the step count to ``update``, so that two calls would transport state
    twice. ``update`` requires ``params``, for the shapes, and ``low`` in the dtypes of ``project``.
    Extra arguments go to the transformations.

    A residual (``project_back(residual=...)``) is :math:`E\,\mathrm{diag}(\varphi)` with
    :math:`E = G - P P^\top G`. Given φ it is linear in G, but φ depends on the mean gradient of the
    step: "fisher" and the limit on the norm's growth need the norms of the columns of E, which are
    not sums over micro-batches or devices. E itself is as large as G. Therefore ``update`` then
    needs the mean gradient as ``full``, with ``low = project(full, state)``.

    Args:
      tx: a result of :func:`natgalore_jax.chain` that begins with its only subspace, such as
        :func:`.natural_galore_adamw`, :func:`.galore_adamw`, :func:`.natural_galore` and the
        published variants.

    Returns:
      A :class:`.LowRankSteps` of pure functions on the state of ``tx``.

    Raises:
      TypeError: if ``tx`` is anything else, such as ``optax.chain`` or ``optax.MultiSteps`` around
        a subspace.
      ValueError: if the chain has no subspace, several, or a transformation before its subspace;
        from ``steps.update`` for a residual without ``full``, and for wrong shapes.

    Example:
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> params = {"w": jnp.zeros((6, 8)), "b": jnp.zeros(8)}
      >>> loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"] - x[:, :1]) ** 2)
      >>> micro_batches = jax.random.normal(jax.random.key(0), (4, 16, 6))

      >>> tx = ng.galore_adamw(0.1, rank=2)
      >>> steps, state = ng.training.low_rank_steps(tx), tx.init(params)
      >>> mean = steps.empty_mean(params, state)
      >>> for i, batch in enumerate(micro_batches):
      ...     state, mean = steps.accumulate(jax.grad(loss)(params, batch), state, mean, i)
      >>> mean["w"].shape, mean["b"].shape
      ((2, 8), (8,))
      >>> updates, state = steps.update(mean, state, params)
      >>> updates["w"].shape
      (6, 8)
    """
    subspace, after = _parts(tx)
    members, inside = (subspace, *after), subspace.number_of_states
    residual = subspace.closer.residual

    def refresh(grads, state, axis_name=None, is_scheduled=True):
        check_states(members, state)
        own = subspace.refresh(grads, state[:inside], axis_name, is_scheduled)
        return (*own, *state[inside:])

    def project(grads, state):
        check_states(members, state)
        return subspace.project(grads, state[:inside])

    def update(low, state, params, full=None, **extra_args):
        check_states(members, state)
        if params is None:
            raise ValueError("update needs params, for the shapes of the updates: got None")
        if residual is not None and full is None:
            raise ValueError(
                f"project_back(residual={residual.rule!r}) adds the residual of the gradient, "
                "which the low-rank gradient does not determine: pass the full gradient to update "
                "as full=..., or make the optimizer with residual='none'"
            )
        updates, own = subspace.update_from_low_rank(low, state[:inside], params, full, extra_args)
        updates, outer = update_members(after, updates, state[inside:], params, extra_args)
        return updates, (*own, *outer)

    return LowRankSteps(refresh, project, update, residual is not None)


def _parts(tx: Any) -> tuple[Subspace, tuple[Any, ...]]:
    """The only subspace of a chain, which comes first, and the later members."""
    if not isinstance(tx, Chain):
        raise TypeError(
            "low_rank_steps takes a result of natgalore_jax.chain, such as natural_galore_adamw or "
            f"galore_adamw, got {type(tx).__name__}. A wrapper (optax.chain, optax.MultiSteps, "
            "optax.inject_hyperparams, ...) hides the subspace: pass the chain itself, or put the "
            "transformation into it"
        )
    at = [i for i, member in enumerate(tx.members) if isinstance(member, Subspace)]
    if len(at) != 1:
        raise ValueError(
            "low_rank_steps needs a chain with one subspace (low_rank_project or natural_galore), "
            f"got one with {len(at)}"
        )
    if at[0] > 0:
        raise ValueError(
            f"{at[0]} transformation(s) before the subspace need the full gradient, which does not "
            "exist when low-rank gradients are summed: put them inside, after low_rank_project. "
            "optax.clip_by_global_norm clips the norm of the low-rank gradient there"
        )
    subspace, *after = tx.members
    return subspace, tuple(after)
