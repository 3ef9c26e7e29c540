"""Clipping of the leading singular values of an update, as a transformation."""

import jax
import optax

from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.spectral import clip_each
from natgalore_jax._src.kernels.stacks import for_each, merged
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import check_integer, check_number
from natgalore_jax._src.params.plan import PlanSettings, plan_tree
from natgalore_jax._src.params.where import Where, hidden_matrices


def clip_leading_singular_value(
    limit: float = 0.2,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    singular_values: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the largest singular values of the update of each matrix.

    .. math::
      U \leftarrow U -
        \sum_{i=1}^{k} \Bigl(1 - \frac{c \sqrt{\max(m, n)}}{\sigma_i}\Bigr)_{\!+} x_i x_i^\top U

    with the k leading left singular vectors x. The other singular values stay. The bound is the
    singular value of a matrix with orthogonal rows or columns and entries of root mean square c.

    Gradients of the first steps of a training are nearly of rank one, because all tokens ask for
    the same change. Adam, and every other rule that brings the entries of an update to one size,
    makes an update with a spectral norm of about :math:`\sqrt{mn}` of it, which grows with the
    width and changes the activations of all tokens alike. Clipped, the update bears higher
    learning rates (docs/experiments.md, "Clipping the leading singular value").

    The vectors are computed by four power iterations from fixed random numbers: the update is read
    nine times, and there is no state. In a training with AdamW, :math:`\sigma_1` is found to one
    percent in the median. Where the next singular value is near, a vector is a mixture of several
    directions, and less is taken away. No singular value grows. Non-finite updates stay non-finite.

    Args:
      limit: c, a number or a traced scalar. Put the learning rate after this transformation.
      where: which matrices are clipped, in the forms of :func:`low_rank_project`; by default hidden
        matrices of any size.
      axes: see :func:`low_rank_project`.
      singular_values: k. Four bear higher rates in wider models than one, and have no lower loss at
        tuned rates (docs/experiments.md, "Clipping the leading singular value").

    Returns:
      An ``optax.GradientTransformationExtraArgs`` without state.

    Raises:
      TypeError, ValueError: for an argument of a wrong type or value, ``limit`` ≤ 0.

    References:
      Yang et al., A spectral condition for feature learning (2023), arXiv 2310.17813, for spectral
      norms as the sizes of updates that carry over to other widths; Liu et al., Muon is scalable
      for LLM training (2025), arXiv 2502.16982, for :math:`c \sqrt{\max(m, n)}` with c = 0.2, the
      singular values of its updates. Clipping the leading ones is of this library.

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> tx = optax.chain(optax.scale_by_adam(), ng.clip_leading_singular_value())
      >>> grads = {"mlp": jnp.ones((64, 256))}  # Adam makes a norm of √(64 · 256) = 128 of it
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> round(float(jnp.linalg.norm(updates["mlp"], 2)), 3)  # 0.2 √256
      3.2
    """
    check_number("limit", limit, above=0.0)
    check_integer("singular_values", singular_values, minimum=1)
    settings = PlanSettings(None, where, axes)

    @own_arithmetic
    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, treedef = jax.tree.flatten(updates)
        plans = plan_tree(settings, updates)
        own = [plan and (plan.unnamed, singular_values) for plan in plans]
        (clipped,) = merged(for_each(clip_each, own, (leaves,), limit), leaves)
        return treedef.unflatten(clipped), state

    def init_fn(params):
        plan_tree(settings, params)  # for errors and record_plans
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
