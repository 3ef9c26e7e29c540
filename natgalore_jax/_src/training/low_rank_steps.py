"""An update in three steps, for gradients that are summed or sent as low-rank ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.subspace.chain import Chain, check_states, update_members
from natgalore_jax._src.subspace.subspace import Subspace


class LowRankSteps(NamedTuple):
    """The parts of an update; what :func:`.low_rank_steps` returns."""

    #: ``(grads, state, axis_name=None, is_scheduled=True) -> state``: new bases where they are due
    #: at this count; with ``is_scheduled=False`` only of matrices without a gradient so far, which
    #: may follow at any micro-batch.
    refresh: Callable[..., optax.OptState]
    #: ``(grads, state) -> low``: R where a parameter is projected, elsewhere the gradient itself.
    project: Callable[[Any, optax.OptState], Any]
    #: ``(low, state, params, full=None, **extra_args) -> (updates, state)``: what is left of the
    #: update.
    update: Callable[..., tuple[Any, optax.OptState]]
    #: Whether update needs ``full``, the gradient that ``low`` is the projection of: a residual.
    needs_full: bool

    def exchange(
        self, grads: Any, state: optax.OptState, axis_name: str
    ) -> tuple[optax.OptState, Any]:
        """Sum over devices that have gradients of their own.

        They exchange the low-rank gradients, and whole ones only of matrices whose basis is due,
        on average one in ``update_interval`` at each step. For use within ``jax.shard_map`` or
        ``jax.pmap``; :func:`.data_parallel_step` does all of it.

        Args:
          grads: of the mean loss of this device's rows, as many on each device.
          state: of the optimizer, the same on all devices.
          axis_name: of the devices.

        Returns:
          The refreshed state, and the low-rank tree of the mean gradient for ``update``, both the
          same on all devices.
        """
        state = self.refresh(grads, state, axis_name=axis_name)
        return state, jax.lax.pmean(self.project(grads, state), axis_name)

    def accumulate(
        self,
        grads: Any,
        state: optax.OptState,
        mean: Any,
        position: jax.typing.ArrayLike,
        axis_name: str | None = None,
    ) -> tuple[optax.OptState, Any]:
        """Takes the gradient of one micro-batch into the mean of a step's low-rank gradients.

        Args:
          grads: of this micro-batch.
          state: of the optimizer. The first micro-batch of a step refreshes it; a matrix that has
            had no gradient before has its first refresh at any.
          mean: of the low-rank gradients of this step so far; of the shapes that ``project`` gives.
          position: how many they are, int32; at 0 the old mean does not matter.
          axis_name: of devices that have gradients of their own. Their bases are due to the mean of
            all gradients of the first micro-batch; the means stay those of each device.

        Returns:
          The new state and mean. After the last micro-batch ``update`` takes the mean, or with
          ``axis_name`` ``jax.lax.pmean`` of it.
        """
        state = self.refresh(grads, state, axis_name=axis_name, is_scheduled=position == 0)
        return state, _mean(position, mean, self.project(grads, state))


@own_arithmetic
def _mean(position: jax.typing.ArrayLike, mean: Any, new: Any) -> Any:
    """The mean of ``position`` trees with another one."""
    return jax.tree.map(
        lambda m, x: jnp.where(position == 0, x, m + (x - m) / (position + 1)), mean, new
    )


def low_rank_steps(tx: optax.GradientTransformation) -> LowRankSteps:
    r"""The update of an optimizer taken apart, to work with low-rank gradients in between.

    For ``steps = low_rank_steps(tx)``

    .. code-block:: python

      state = steps.refresh(grads, state)                 # P ← P', what is stored follows
      low = steps.project(grads, state)                   # R = PᵀG
      updates, state = steps.update(low, state, params)   # U = α P N(R) and what follows

    is ``updates, state = tx.update(grads, state, params)``. ``project`` is linear in the gradient,
    so that sums and means of gradients can be taken of R instead, exactly:

    * Gradient accumulation: ``refresh`` with the gradient of the first micro-batch, which thereby
      decides the basis of the whole step; ``project`` each micro-batch's gradient and average the
      results, or leave both to ``accumulate``; one ``update``. The accumulator has the size of R,
      r/m of that of G for each matrix whose m rows are projected, and the inner optimizer runs once
      a step. (``optax.MultiSteps`` inside the chain has the small accumulator as well, but runs all
      that surrounds it for each micro-batch.)
    * Data parallelism: the devices exchange R in the place of G, see ``exchange`` and
      :func:`.data_parallel_step`.

    ``refresh`` leaves the step count alone: call it once before each ``update``, also where no
    refresh is due, which it finds out itself; twice at one count would move bases and moments
    twice. Only ``update`` counts. Its ``params`` are required, for the shapes; ``low`` has to have
    the dtypes that ``project`` gave. Extra arguments go to the transformations.

    A residual (``project_back(residual=...)``) is :math:`E\,\mathrm{diag}(\varphi)` with
    :math:`E = G - P P^\top G`. It is linear in G once φ is known, but φ belongs to the mean
    gradient of the step, and "fisher" and the limit on the norm's growth take from it the norms
    of the columns of E, which are not sums over micro-batches or devices. And E itself is as
    large as G. Nothing smaller than the mean gradient determines the update, therefore
    ``update`` then takes it as ``full``, and ``low`` is ``project(full, state)``.

    Args:
      tx: what :func:`natgalore_jax.chain` returns, with one subspace that comes first; so do
        :func:`natural_galore_adamw`, :func:`galore_adamw`, :func:`natural_galore` and the
        published variants.

    Returns:
      A :class:`.LowRankSteps` of pure functions on the state of ``tx``.

    Raises:
      TypeError: if ``tx`` is anything else, such as ``optax.chain`` or ``optax.MultiSteps`` around
        a subspace, which hide it.
      ValueError: if the chain has no subspace, several, or a transformation before its subspace.
        ``steps.update`` raises it for a residual without ``full``, and for shapes that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optax, natgalore_jax as ng
      >>> params = {"w": jnp.zeros((6, 8)), "b": jnp.zeros(8)}
      >>> loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"] - x[:, :1]) ** 2)
      >>> micro_batches = jax.random.normal(jax.random.key(0), (4, 16, 6))

      >>> tx = ng.galore_adamw(0.1, rank=2)
      >>> steps, state = ng.training.low_rank_steps(tx), tx.init(params)
      >>> mean = optax.tree.zeros_like(steps.project(params, state))
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
                f"project_back(residual={residual.rule!r}) adds what the subspace misses of the "
                "gradient, which the low-rank gradient does not tell: give update the whole "
                "gradient as full=..., or make the optimizer with residual='none'"
            )
        updates, own = subspace.update_from_low_rank(low, state[:inside], params, full, extra_args)
        updates, rest = update_members(after, updates, state[inside:], params, extra_args)
        return updates, (*own, *rest)

    return LowRankSteps(refresh, project, update, residual is not None)


def _parts(tx: Any) -> tuple[Subspace, tuple[Any, ...]]:
    """The one subspace of a chain, which comes first, and what follows it."""
    if not isinstance(tx, Chain):
        raise TypeError(
            "low_rank_steps takes what natgalore_jax.chain returns, as natural_galore_adamw and "
            f"galore_adamw do, got {type(tx).__name__}. A transformation around it (optax.chain, "
            "optax.MultiSteps, optax.inject_hyperparams, ...) hides the subspace: give the chain "
            "itself, or put the transformation into it"
        )
    at = [i for i, member in enumerate(tx.members) if isinstance(member, Subspace)]
    if len(at) != 1:
        raise ValueError(
            "low_rank_steps needs a chain with one subspace (low_rank_project or natural_galore), "
            f"got one with {len(at)}"
        )
    if at[0] > 0:
        raise ValueError(
            f"{at[0]} transformation(s) before the subspace need the full gradient, which is not "
            "there when low-rank gradients are summed: put them inside, after low_rank_project. "
            "optax.clip_by_global_norm clips the norm of the low-rank gradient there"
        )
    subspace, *after = tx.members
    return subspace, tuple(after)
