"""Natural gradient with a compact Fisher matrix, around an inner optimizer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.fisher_factors import (
    agreeing,
    averaged,
    gram,
    inverse_power,
    moved_factor,
    multiply,
)
from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.residual import gain
from natgalore_jax._src.kernels.stacks import for_each, merged
from natgalore_jax._src.params.checks import (
    check_boolean,
    check_choice,
    check_damping,
    check_decay,
    check_integer,
    check_number,
    check_static,
    check_transformation,
    check_unused,
)
from natgalore_jax._src.params.context import current_subspace, plan_of
from natgalore_jax._src.params.where import KeyPath
from natgalore_jax._src.states.entries import Part, StateType, register_type
from natgalore_jax._src.states.tree_checks import flatten_like
from natgalore_jax._src.subspace.woodbury import DampingMode, Schedule

STRUCTURES = ("diagonal", "full")


class CompactFisherState(NamedTuple):
    """State of :func:`compact_natural_gradient`."""

    count: jax.typing.ArrayLike  #: shape (), int32: steps taken
    #: A tree of parameters per mode (rows, columns; one per axis for Tucker): float32, batch + (r,)
    #: or batch + (r, r), the factor of that mode; MaskedNode for an unprojected mode.
    fisher: tuple[Any, ...]
    inner: Any  #: the state of the inner optimizer


class _FisherFactors(StateType):
    def entries(self, state: Any, flatten: Callable[[Any], list[Any]]) -> dict[str, Any]:
        return {"fisher": list(zip(*map(flatten, state.fisher), strict=True))}

    def inner(self, state):
        return state.inner

    def parts(self, state):
        factors = Part("history", state.fisher, lambda plan: len(plan.projected_modes))
        return [Part(None, state.count), factors, Part(None, state.inner)]

    def moved(self, fields, change):
        factors, treedef = jax.tree.flatten(fields["fisher"])  # of the projected modes, in order
        if change.transition == "reset":
            return {"fisher": treedef.unflatten(map(jnp.zeros_like, factors))}
        return {
            "fisher": treedef.unflatten(
                moved_factor(A, C) for A, C in zip(factors, change.C_of_axis.values(), strict=True)
            )
        }


register_type(CompactFisherState, _FisherFactors())


def compact_natural_gradient(
    inner: optax.GradientTransformation | None = None,
    decay: float = 0.97,
    damping: float | Schedule = 0.03,
    damping_mode: DampingMode = "relative",
    exponent: float = -0.5,
    structure: str = "diagonal",
    modes: int = 2,
    cautious: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition the update of an inner optimizer with a Fisher matrix of r or r² numbers.

    With R the low-rank gradient of a matrix whose rows are projected, and N the update of the inner
    optimizer,

    .. math::
      A_t = \beta A_{t-1} + (1 - \beta)\, R R^\top, \qquad
      \lambda = \rho\,\tfrac1r \operatorname{tr} A_t, \qquad
      \tilde N = \frac{\lVert N \rVert}{\lVert (A_t + \lambda I)^{p} N \rVert}\;
      (A_t + \lambda I)^{p}\, N .

    A starts at its first value. :math:`I_n \otimes A / n` is the empirical Fisher matrix of R with
    its columns stacked, averaged over columns and steps: the limit of a long history of
    :func:`woodbury_natural_gradient`, in constant memory. The diagonal suffices for a basis of
    dominant directions, which are near the eigenvectors of A. The matrix acts on the update and not
    on the gradient, because Adam undoes any scaling of the directions of its input. Adam divides a
    direction by about the root of its Fisher entry, and p = −1/2 divides by the root again, which
    makes a natural gradient. The update keeps its norm, so that the inner optimizer still
    determines the step size. If columns are projected, the factor acts from the right; if both
    sides are projected, there is one factor for each with p / 2, as in Shampoo; and so on for
    Tucker.

    With ``cautious`` entries of :math:`\tilde N` whose sign differs from the same entry of R are
    set to zero, and the others divided by their share in the matrix (at least 0.05): momentum does
    not act against the newest gradient, and the mean step size is preserved.

    Use it in a subspace (:func:`natgalore_jax.chain`). Unprojected parameters take the update of
    the inner optimizer.

    Args:
      inner: the transformation whose updates are preconditioned, such as Adam. None: the low-rank
        gradient is preconditioned.
      decay: β.
      damping: ρ, without a unit ("relative"), or λ in units of gradient² ("absolute"); a number
        above zero or a schedule of the step count.
      damping_mode: ``"relative"`` or ``"absolute"``.
      exponent: p, from −1 to 0, excluded.
      structure: ``"diagonal"``, r numbers and no factorisation, or ``"full"``, r² numbers and an
        eigendecomposition of every factor at every step.
      modes: number of modes: 2 for matrices, the length of the rank for Tucker.
      cautious: drop entries that oppose the gradient. Updates of ``inner`` must point along the
        gradient, as with ``optax.scale_by_adam``, without a negative learning rate.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`CompactFisherState`. Updates keep
      their shape and dtype; factors are float32. Non-finite gradients do not enter A.

    Raises:
      TypeError, ValueError: for an argument of a wrong type or value, and for ``cautious`` where it
        would have no effect; at ``init`` outside of a subspace, and for a parameter with another
        number of modes.

    References:
      Natural GaLore (2024) for the natural gradient in the subspace; Gupta et al., Shampoo (2018),
      for the factors; Anil et al. (2021) for preserving the norm ("grafting"); Liang et al.,
      Cautious Optimizers (2024).

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> tx = ng.chain(
      ...     ng.low_rank_project(rank=2),
      ...     ng.compact_natural_gradient(optax.scale_by_adam()),
      ...     ng.project_back(scale=0.25),
      ... )
      >>> state = tx.init({"w": jnp.ones((6, 8)), "b": jnp.ones(8)})
      >>> state[1].fisher[0]["w"].shape, state[1].inner.mu["w"].shape
      ((2,), (2, 8))
    """
    check_decay("decay", decay)
    check_choice("damping_mode", damping_mode, DampingMode)
    check_damping(damping)
    check_choice("structure", structure, STRUCTURES)
    check_integer("modes", modes, minimum=2)
    check_boolean("cautious", cautious)
    check_static("exponent", exponent, "a Python number")
    check_number("exponent", exponent)
    if not -1.0 <= exponent < 0.0:
        raise ValueError(f"exponent must be at least -1 and less than 0, got {exponent}")
    if inner is None and structure == "diagonal":
        check_unused("cautious", cautious, False, "on the low-rank gradient itself (inner=None)")
    relative, diagonal = damping_mode == "relative", structure == "diagonal"
    if inner is not None:
        check_transformation("inner", inner)
    # The low-rank axis of each mode in R. The unprojected mode of a matrix may have several axes.
    axes = (0, -1) if modes == 2 else tuple(range(modes))
    settings = _Settings(axes, diagonal, relative, float(exponent), cautious)
    inner_tx = optax.with_extra_args_support(inner if inner is not None else optax.identity())

    def init_fn(params):
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        factors = [_start(KeyPath(path), leaf, axes, diagonal) for path, leaf in leaves]
        return CompactFisherState(
            jnp.zeros([], jnp.int32), _trees(treedef, factors, modes), inner_tx.init(params)
        )

    def update_fn(updates, state, params=None, **extra_args):
        current = damping(state.count) if callable(damping) else damping
        R, treedef = jax.tree.flatten(updates)
        columns = [flatten_like(updates, tree, "the parameters at init") for tree in state.fisher]
        updates, inner_state = inner_tx.update(updates, state.inner, params, **extra_args)

        out = treedef.flatten_up_to(updates)
        factors = [
            {m: A for m, A in enumerate(entries) if not isinstance(A, optax.MaskedNode)}
            for entries in zip(*columns, strict=True)
        ]
        own = [settings if factors_of_leaf else None for factors_of_leaf in factors]
        shared = (decay, current)
        found = for_each(_preconditioned, own, (R, out, factors), shared)
        out, factors = merged(found, out, factors)
        new_state = CompactFisherState(
            optax.safe_increment(state.count), _trees(treedef, factors, modes), inner_state
        )
        return treedef.unflatten(out), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Settings(NamedTuple):
    axes: tuple[int, ...]
    diagonal: bool
    relative: bool
    exponent: float
    cautious: bool


def _preconditioned(settings, operands, shared):
    """Update of one parameter, in the dtype of N, and its new factors by mode."""
    axes, diagonal, relative, exponent, cautious = settings
    (R, N, own), (decay, damping) = operands, shared
    nb = next(A.ndim for A in own.values()) - (1 if diagonal else 2)
    dtype, N = N.dtype, N.astype(jnp.float32)
    new, factors = N, {}
    for mode, A in own.items():
        now = gram(R, axes[mode], nb, diagonal=diagonal)
        A = factors[mode] = averaged(A, now, decay, nb)
        W = inverse_power(A, damping, exponent / len(own), nb, relative=relative)
        new = multiply(W, new, axes[mode], nb)
    own_axes = tuple(range(nb, N.ndim))
    ratio = gain(*(jnp.sum(jnp.square(x), own_axes, keepdims=True) for x in (N, new)))
    if cautious:
        new, share = agreeing(new, R.astype(jnp.float32), nb)
        ratio = ratio / share
    return (new * ratio).astype(dtype), factors


@own_arithmetic
def _start(path: KeyPath, leaf: Any, axes: Sequence[int], diagonal: bool) -> dict[int, jax.Array]:
    """Zero factors of one parameter by mode, with the sharding of later factors."""
    if current_subspace() is None:
        raise ValueError(
            "compact_natural_gradient acts on low-rank gradients and there are none here: use "
            "it in natgalore_jax.chain after low_rank_project"
        )
    plan = plan_of(path, leaf)
    if plan is None:
        return {}
    if len(plan.modes) != len(axes):
        raise ValueError(
            f"{path}: compact_natural_gradient was made for {len(axes)} modes, got a parameter "
            f"with {len(plan.modes)}: give it modes={len(plan.modes)}, the length of the rank"
        )
    zeros = optax.tree.zeros_like(leaf, dtype=jnp.float32)
    nb = len(plan.batch)
    return {m: gram(zeros, axes[m], nb, diagonal=diagonal) for m in plan.projected_modes}


def _trees(treedef: Any, factors: Sequence[dict[int, jax.Array]], modes: int) -> tuple[Any, ...]:
    """One tree per mode, masked where unprojected, from the factors of each leaf by mode."""
    return tuple(
        treedef.unflatten(own.get(mode, optax.MaskedNode()) for own in factors)
        for mode in range(modes)
    )
