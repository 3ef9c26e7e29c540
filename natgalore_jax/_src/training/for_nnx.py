"""Sharding metadata of an optimizer's state for Flax NNX."""

from typing import Any

import jax
import optax

from natgalore_jax._src.params.checks import check_transformation
from natgalore_jax._src.training.state_shardings import state_shardings


def for_nnx(
    tx: optax.GradientTransformation, shardings: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Prepare an optimizer for ``nnx.Optimizer`` and a model with sharding metadata.

    ``nnx.Optimizer`` copies the metadata of each parameter (``out_sharding``) onto all state that
    is stored under the name of the parameter. That is wrong for bases, moments in a subspace and
    other arrays of another shape, and trainers that place the state by metadata (Tunix, MaxText)
    then fail. Here each array of the state has the sharding of :func:`.state_shardings`, and
    metadata that says so. Updates are those of ``tx``.

    Args:
      tx: any Optax transformation.
      shardings: a ``jax.sharding.NamedSharding`` for each parameter, in the structure of
        ``nnx.as_pure(nnx.state(model, nnx.Param))``, or one for all. None: the shardings of the
        parameters; parameters that are on no mesh leave the state without metadata. It is required
        if the optimizer is created within ``nnx.jit`` or ``nnx.eval_shape`` on automatic axes,
        where arrays do not have their shardings.

    Returns:
      A transformation for ``nnx.Optimizer``. Its ``init`` requires Flax.

    Raises:
      ValueError: at ``init``, see :func:`.state_shardings`.

    Example:
      >>> import jax, natgalore_jax as ng
      >>> from flax import nnx
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> columns = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
      >>> with jax.set_mesh(mesh):
      ...     model = nnx.Linear(6, 8, kernel_init=columns, use_bias=False, rngs=nnx.Rngs(0))
      >>> tx = ng.training.for_nnx(ng.galore_adamw(1e-2, rank=2))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> specs = nnx.get_partition_spec(nnx.state(optimizer, nnx.optimizer.OptState))
      >>> sorted({str(spec) for spec in jax.tree.leaves(nnx.as_pure(specs))})
      ["P('model', None)", 'P()', "P(None, 'model')"]
    """
    check_transformation("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        from flax import nnx  # the library does not depend on it

        params = nnx.as_pure(params)
        own = (getattr(x, "sharding", None) for x in jax.tree.leaves(params))
        if shardings is None and not any(isinstance(s, jax.NamedSharding) for s in own):
            return tx.init(params)
        state_at = state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=state_at)(params)
        return jax.tree.map(
            lambda x, at: nnx.Variable(x, out_sharding=at.spec, eager_sharding=False),
            state,
            state_at,
        )

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)
