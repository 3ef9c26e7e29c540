"""The natural gradient with a compact Fisher matrix, around an inner optimizer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._check_tree import flatten_like
from natgalore_jax._compact_fisher import averaged, damped, gram, multiply, power, with_norm_of
from natgalore_jax._scope import current_subspace
from natgalore_jax._validate import check_choice, check_decay, check_number
from natgalore_jax._where import KeyPath
from natgalore_jax._woodbury import DAMPING_MODES


class CompactFisherState(NamedTuple):
    """State of :func:`compact_natural_gradient`."""

    count: jax.typing.ArrayLike  # shape (), int32: steps taken
    # A tree of parameters for rows and one for columns: batch + (r, r), float32, the factor of that
    # side, or MaskedNode where the side is not projected.
    fisher: tuple[Any, Any]
    inner: Any  # the state of the inner optimizer


def compact_natural_gradient(
    inner: optax.GradientTransformation | None = None,
    decay: float = 0.97,
    damping: float | Callable[[jax.Array], jax.Array] = 0.03,
    damping_mode: str = "relative",
    exponent: float = -0.5,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions what an inner optimizer makes of the low-rank gradient, with r² numbers.

    With R the low-rank gradient of a matrix whose rows are projected, and N what the inner
    optimizer makes of it,

    .. math::
      A_t = \beta A_{t-1} + (1 - \beta)\, R R^\top, \qquad
      \lambda = \rho\,\tfrac1r \operatorname{tr} A_t, \qquad
      \tilde N = \frac{\lVert N \rVert}{\lVert (A_t + \lambda I)^{p} N \rVert}\;
      (A_t + \lambda I)^{p}\, N .

    :math:`A \otimes I_n` is the empirical Fisher matrix of the columns of R, averaged over columns
    and steps: the limit of a long history of :func:`woodbury_natural_gradient`, whose memory does
    not grow with it. It acts on the update, after Adam and not before, because Adam undoes
    any scaling of the directions that it is given; and it keeps the update's norm, so that
    it changes the direction and leaves the step size to the inner optimizer. If columns are
    projected the factor acts from the right, if both sides are there is one factor for each, with
    p / 2 each, as in Shampoo.

    It belongs in a subspace (:func:`natgalore_jax.chain`). Parameters that are not
    projected are left to the inner optimizer.

    Args:
      inner: the transformation whose updates are preconditioned, Adam for instance. None: the
        low-rank gradient itself.
      decay: β.
      damping: ρ, without a unit ("relative"), or λ in units of gradient² ("absolute"); a number
        above zero or a schedule of the step count.
      damping_mode: ``"relative"`` or ``"absolute"``.
      exponent: p, from −1, the natural gradient, to 0, excluded. −1/2 whitens: every direction is
        moved equally. −1 takes a Cholesky factorisation of A, others its eigenvectors.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`CompactFisherState`. Updates keep
      their shape and dtype; factors are float32. A gradient that is not finite does not enter A.

    Raises:
      TypeError, ValueError: for an argument of a wrong type or value; at ``init`` outside of a
        subspace, and for a parameter with more than two modes (Tucker).

    References:
      Natural GaLore (2024) for the natural gradient in the subspace; Gupta et al., Shampoo (2018),
      for the factors; Anil et al. (2021) for keeping the norm ("grafting").

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> tx = ng.chain(
      ...     ng.low_rank_project(rank=2),
      ...     ng.compact_natural_gradient(optax.scale_by_adam()),
      ...     ng.project_back(scale=0.25),
      ... )
      >>> state = tx.init({"w": jnp.ones((6, 8)), "b": jnp.ones(8)})
      >>> state[1].fisher[0]["w"].shape, state[1].inner.mu["w"].shape
      ((2, 2), (2, 8))
    """
    check_decay("decay", decay)
    check_choice("damping_mode", damping_mode, DAMPING_MODES)
    if not callable(damping):
        check_number("damping", damping, above=0.0)
    check_number("exponent", exponent)
    if not -1.0 <= exponent < 0.0:
        raise ValueError(f"exponent must be at least -1 and less than 0, got {exponent}")
    is_relative = damping_mode == "relative"
    within = optax.with_extra_args_support(inner if inner is not None else optax.identity())

    def init_fn(params):
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        factors = [_start(KeyPath(path), leaf) for path, leaf in leaves]
        return CompactFisherState(
            jnp.zeros([], jnp.int32), _two_trees(treedef, factors), within.init(params)
        )

    def update_fn(updates, state, params=None, **extra_args):
        current = damping(state.count) if callable(damping) else damping
        R, treedef = jax.tree.flatten(updates)
        rows, columns = (
            flatten_like(updates, tree, "the parameters at init") for tree in state.fisher
        )
        updates, inner_state = within.update(updates, state.inner, params, **extra_args)

        out, factors = [], []
        for r, n, *pair in zip(R, treedef.flatten_up_to(updates), rows, columns, strict=True):
            own = {m: A for m, A in enumerate(pair) if not isinstance(A, optax.MaskedNode)}
            for mode, A in own.items():
                own[mode] = averaged(A, gram(r, _AXES[mode], A.ndim - 2), decay)
            if own:
                n = _precondition(own, n, current, is_relative, exponent).astype(n.dtype)
            out.append(n)
            factors.append(own)
        new_state = CompactFisherState(
            optax.safe_increment(state.count), _two_trees(treedef, factors), inner_state
        )
        return treedef.unflatten(out), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Where the low-rank axis of the rows and that of the columns stand in R.
_AXES = (0, -1)


def _start(path: KeyPath, leaf: Any) -> dict[int, jax.Array]:
    """Empty factors of one parameter by mode, sharded as those of its gradients will be."""
    plans = current_subspace()
    if plans is None:
        raise ValueError(
            "compact_natural_gradient acts on low-rank gradients and there are none here: use "
            "it in natgalore_jax.chain after low_rank_project"
        )
    plan = plans.get(str(path))
    if plan is None:
        return {}
    if len(plan.modes) != 2:
        raise ValueError(
            f"{path}: compact_natural_gradient needs matrices, got a tensor of {len(plan.modes)} "
            "modes (a tuple for rank)"
        )
    zeros = optax.tree.zeros_like(leaf, dtype=jnp.float32)
    return {mode: gram(zeros, _AXES[mode], len(plan.batch)) for mode in plan.projected_modes}


def _precondition(
    factors: dict[int, jax.Array], N: jax.Array, damping: Any, relative: bool, exponent: float
) -> jax.Array:
    new = N = N.astype(jnp.float32)
    for mode, A in factors.items():
        W = power(damped(A, damping, relative), exponent / len(factors))
        new = multiply(W, new, _AXES[mode], A.ndim - 2)
    return with_norm_of(N, new, next(iter(factors.values())).ndim - 2)


def _two_trees(treedef: Any, factors: Sequence[dict[int, jax.Array]]) -> tuple[Any, Any]:
    """A tree for rows and one for columns, with holes, from the factors of each leaf by mode."""
    rows, columns = (
        treedef.unflatten(own.get(mode, optax.MaskedNode()) for own in factors) for mode in (0, 1)
    )
    return rows, columns
