"""SCALE: SGD with normalised columns, and momentum for the output head alone."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.contrib.descent import descent
from natgalore_jax._src.kernels.kernel import kernel, own_arithmetic
from natgalore_jax._src.low_bits.adam import adam_in_float32
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import check_adam, check_choice, check_decay, check_number
from natgalore_jax._src.params.plan import (
    PlanSettings,
    plan_tree,
    require_matrices,
    without_matrices,
)
from natgalore_jax._src.params.where import KeyPath, Where, all_matrices, output_heads, selected
from natgalore_jax._src.states.tree_checks import (
    check_params,
    check_stored,
    check_type,
    form_in,
    sees_parts,
    with_dtypes_of,
    with_update_dtypes,
)

NORMS = ("rms", "l2")


class ScaleByColumnNormsState(NamedTuple):
    """State of :func:`.scale_by_column_norms`."""

    #: An optax.ScaleByAdamState of the parameters that are not matrices: mu and nu are trees of
    #: parameters, shape and dtype of the parameter (mu: mu_dtype); MaskedNode for a matrix.
    adam: Any
    #: The tree of parameters: shape of the parameter, its dtype or mu_dtype, for an output head;
    #: else MaskedNode.
    momentum: Any


def scale_by_column_norms(
    norm: str = "rms",
    momentum: float = 0.9,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    vector_ratio: float = 1.0,
    head: Where | None = None,
    where: Where | None = None,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide each column of a gradient by its norm; momentum for the output head alone.

    For one matrix with gradient G, with m inputs as rows and outputs as columns,

    .. math::
      M \leftarrow \beta M + (1 - \beta) G \;\text{(output head)}, \qquad M = G \;\text{(others)},
      \qquad U_{:j} = M_{:j} \,/\, \max(\nu(M_{:j}), \varepsilon),

    where ν is the root mean square of a column, ‖·‖ / √m, or its Euclidean norm. The only state of
    matrices is the momentum of the head, mn numbers. Vectors take ``vector_ratio`` times Adam's
    step. The norms are float32. The momentum has no bias correction, on which U does not depend.

    Embeddings, (vocabulary, width), are matrices with a row for each token: their columns run over
    the vocabulary. A model with tied embeddings has no output head, and no momentum by default:
    select the table by ``head``, and set its ``axes`` to ``MatrixAxes(rows=1, cols=0)`` to
    normalise the gradient of each token, as in an output head.

    Args:
      norm: ν. ``"rms"``: columns of root mean square one, as in the published program and for the
        published learning rates; ``"l2"``: columns of Euclidean norm one, as in the paper. Updates
        differ by √m, a factor that depends on the matrix.
      momentum: β of the output head.
      b1, b2: Adam's, for vectors.
      eps: ε, the smallest norm, in the unit of a gradient, and Adam's ``eps``. A column of zeros
        stays zero. Squares of entries beyond 1e19 overflow float32, and their column becomes zero.
      mu_dtype: dtype of the momenta of head and Adam; None: dtype of the parameter.
      vector_ratio: learning rate of vectors over that of matrices.
      head: which matrices are output heads, in the forms of ``where``, among the matrices that
        ``where`` selects; None: by their names, see :func:`.hidden_matrices` ("head", "lm_head",
        "logits", "classifier", ...).
      where: the matrices, in the forms of :func:`.low_rank_project`; None: all with
        two axes or more, except norms and biases of stacked layers by their names. All other
        parameters are vectors.
      axes: which axes are inputs (``rows``) and outputs (``cols``), as in
        :func:`.low_rank_project`; by default the last two, (in, out) as in Flax. For weights as
        PyTorch stores them, (out, in), ``MatrixAxes(rows=-1, cols=-2)``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`.ScaleByColumnNormsState`.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value; at ``init``
        if there are parameters and no matrix among them, for a matrix that is not floating-point
        of at least 16 bits, or that ``head`` selects and ``where`` leaves out, and for a ``head``
        that selects no matrix; at ``update`` for gradients of other shapes than the parameters, and
        of heads and vectors than at ``init``. A NaN makes its column NaN, an infinite entry itself
        NaN and the rest of its column zero. Both remain in the momentum of a head: put
        ``optax.apply_if_finite`` around the optimizer.

    References:
      Glentis et al., Memory-efficient LLM pretraining via minimalist optimizer design (2025, ICML
      2026), arXiv 2506.16659, algorithm 1 for ``norm="l2"``. That ν is a root mean square, that
      columns of embeddings run over the vocabulary, that vectors take Adam's steps at a rate of
      their own, and ε are taken from the authors' program; its Adam has ε within the bias
      correction, here it is ``optax.scale_by_adam``.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> tx = ng.contrib.scale_by_column_norms()
      >>> params = {"mlp": jnp.ones((6, 8)), "lm_head": jnp.ones((8, 20)), "b": jnp.ones(8)}
      >>> state = tx.init(params)
      >>> state.momentum["lm_head"].shape, state.momentum["mlp"], state.adam.mu["b"].shape
      ((8, 20), MaskedNode(), (8,))
      >>> updates, state = tx.update(params, state)
      >>> bool(jnp.allclose(jnp.mean(updates["mlp"] ** 2, axis=0), 1))
      True
    """
    check_choice("norm", norm, NORMS)
    check_decay("momentum", momentum)
    check_number("vector_ratio", vector_ratio, below=math.inf)
    head_given = head is not None
    both_given = head_given and where is not None
    head = output_heads if head is None else head
    settings = PlanSettings(None, all_matrices if where is None else where, axes)
    check_adam(b1, b2, eps, mu_dtype)
    adam = adam_in_float32(b1, b2, eps, mu_dtype=mu_dtype)

    def plans_of(tree):
        """Plans of matrices, and which of them are output heads."""
        plans = plan_tree(settings, tree)
        heads = [bool(p and h) for p, h in zip(plans, selected(head, tree, "head"), strict=True)]
        return plans, heads

    @own_arithmetic
    def init_fn(params):
        plans, heads = plans_of(params)
        require_matrices(settings, plans, params, "where selects no matrix to be normalised")
        leaves, treedef = jax.tree.flatten(params)
        if both_given:
            _check_heads(params, plans, selected(head, params, "head"))
        if head_given and not sees_parts():
            of_heads = [p if h else None for p, h in zip(plans, heads, strict=True)]
            require_matrices(settings, of_heads, params, "head selects no matrix")
        momenta = [
            jnp.zeros_like(x, dtype=mu_dtype) if is_head else optax.MaskedNode()
            for x, is_head in zip(leaves, heads, strict=True)
        ]
        return ScaleByColumnNormsState(
            adam.init(without_matrices(treedef, leaves, plans)), treedef.unflatten(momenta)
        )

    @own_arithmetic
    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        plans, heads = plans_of(updates)
        G, treedef = jax.tree.flatten(updates)
        check_type(state, ScaleByColumnNormsState, "optimizer")
        forms = [form_in(mu_dtype, jnp.shape(g)) for g in G]
        stored = [form if is_head else None for form, is_head in zip(forms, heads, strict=True)]
        check_stored(updates, stored, state.momentum, "momentum", "head, where or mu_dtype")
        stored = [None if plan else form for form, plan in zip(forms, plans, strict=True)]
        check_stored(updates, stored, state.adam.mu, "moments", "where or mu_dtype")
        check_params(updates, params)

        N, adam_state = adam.update(without_matrices(treedef, G, plans), state.adam)
        out, momenta = treedef.flatten_up_to(N), treedef.flatten_up_to(state.momentum)
        for i, (plan, is_head) in enumerate(zip(plans, heads, strict=True)):
            if plan is None:
                out[i] = _scaled(vector_ratio, out[i])
            elif is_head:
                momenta[i] = _averaged(momentum, G[i], momenta[i])
                out[i] = _normalised(plan.unnamed, norm, eps, momenta[i]).astype(G[i].dtype)
            else:
                out[i] = _normalised(plan.unnamed, norm, eps, G[i])
        out = with_update_dtypes(treedef.unflatten(out), updates, params)
        return out, ScaleByColumnNormsState(
            with_dtypes_of(state.adam, adam_state), treedef.unflatten(momenta)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_heads(params, plans, chosen):
    """Check that every matrix that ``head`` selects is one that ``where`` selects."""
    for (path, leaf), plan, is_head in zip(
        jax.tree_util.tree_leaves_with_path(params), plans, chosen, strict=True
    ):
        if is_head and plan is None and jnp.ndim(leaf) > 1:
            raise ValueError(
                f"{KeyPath(path)}: head selects this parameter of shape {jnp.shape(leaf)}, but "
                "where leaves it out, so that Adam would train it: select it by where too, or "
                "leave it out of head"
            )


@kernel()
def _scaled(ratio, N):
    return (ratio * N).astype(N.dtype)


@kernel()
def _averaged(decay, G, M):
    """``β M + (1 − β) G`` in the dtype of M."""
    M32, G = M.astype(jnp.float32), G.astype(jnp.float32)
    return (decay * M32 + (1 - decay) * G).astype(M.dtype)


@kernel("plan", "norm")
def _normalised(plan, norm, eps, G):
    """The columns of one matrix divided by their norms."""
    rows, _ = plan.modes
    G32 = G.astype(jnp.float32)
    square = jnp.sum(jnp.square(G32), rows, keepdims=True)
    length = jnp.sqrt(square / plan.mode_sizes[0] if norm == "rms" else square)
    # A maximum may ignore a NaN: use where.
    length = jnp.where(length < eps, eps, length)
    return (G32 / jnp.where(length == 0, 1.0, length)).astype(G.dtype)


def scale_sgd(
    learning_rate: optax.ScalarOrSchedule,
    norm: str = "rms",
    momentum: float = 0.9,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    vector_ratio: float = 1.0,
    head: Where | None = None,
    where: Where | None = None,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SCALE: SGD with normalised columns, momentum for the output head, Adam for vectors.

    .. math::
      W \leftarrow W - \eta\,(U + \omega W)

    with U of :func:`.scale_by_column_norms`. The state is one number for each entry of the output
    head and two for each entry of a vector: 1 % of AdamW's bytes for LLaMA 7B.

    It is this composition::

      optax.chain(
          ng.contrib.scale_by_column_norms(
              norm=norm, momentum=momentum, b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype,
              vector_ratio=vector_ratio, head=head, where=where, axes=axes),
          optax.add_decayed_weights(weight_decay, mask),
          optax.scale_by_learning_rate(learning_rate),
      )

    Args:
      learning_rate: η, a number or a schedule. The authors' scripts have 1e-3 for LLaMA 60M to
        350M, 2e-4 for 1B and 1e-4 for 7B, with ``norm="rms"``, a tenth of the steps as warm-up and
        a cosine.
      norm, momentum, b1, b2, eps, mu_dtype, head, where, axes: see
        :func:`.scale_by_column_norms`.
      weight_decay: ω, decoupled; 0 in the scripts.
      mask: which parameters decay, as in ``optax.adamw``.
      vector_ratio: learning rate of vectors over η; 5 at 1B and 10 at 7B in the scripts.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      TypeError, ValueError: as :func:`.scale_by_column_norms`.

    References:
      Glentis et al., Memory-efficient LLM pretraining via minimalist optimizer design (2025, ICML
      2026), arXiv 2506.16659; :func:`.scale_by_column_norms` has the differences from the paper.

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> state = ng.contrib.scale_sgd(1e-3).init({"mlp": jnp.ones((6, 8)), "b": jnp.ones(8)})
      >>> state[0].adam.mu["mlp"], state[0].adam.mu["b"].shape
      (MaskedNode(), (8,))
    """
    return descent(
        scale_by_column_norms(
            norm=norm,
            momentum=momentum,
            b1=b1,
            b2=b2,
            eps=eps,
            mu_dtype=mu_dtype,
            vector_ratio=vector_ratio,
            head=head,
            where=where,
            axes=axes,
        ),
        learning_rate,
        weight_decay,
        mask,
    )
