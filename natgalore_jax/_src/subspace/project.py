"""Projection of gradients into a low-rank subspace."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.basis import Method, start_basis
from natgalore_jax._src.kernels.kernel import kernel
from natgalore_jax._src.kernels.linear_codes import coded_bits
from natgalore_jax._src.kernels.projection import Factors
from natgalore_jax._src.kernels.rotation import Transition
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import (
    check_boolean,
    check_choice,
    check_interval,
    check_seed,
    check_stored_dtype,
    check_unused,
)
from natgalore_jax._src.params.plan import LeafPlan, PlanSettings, Side, check_rank
from natgalore_jax._src.params.where import Where, hidden_matrices
from natgalore_jax._src.refresh.matrix import RefreshSettings
from natgalore_jax._src.states.entries import Part, StateType, register_type

UPDATE_INTERVAL = 200
# Methods without randomness.
DETERMINISTIC = ("svd", "eigh")


class LowRankProjectState(NamedTuple):
    """State of :func:`low_rank_project`."""

    count: jax.typing.ArrayLike  #: shape (), int32: steps taken
    #: One tree of parameters per mode: (rows, columns) for matrices, one per axis for Tucker.
    #: Its leaves are batch + mode + (rank,), basis_dtype, or MaskedNode where unprojected.
    #: In 8 or 4 bits LinearCodes of two such tuples, codes and scales.
    basis: Any


class _Bases(StateType):
    def parts(self, state):
        return [Part("basis", tuple(state), LeafPlan.basis_size)]


register_type(LowRankProjectState, _Bases())


class LowRankProject(optax.GradientTransformationExtraArgs):
    """Result of :func:`low_rank_project`: opens a subspace in :func:`natgalore_jax.chain`."""

    plan: PlanSettings
    refresh: RefreshSettings
    basis_dtype: Any

    @property
    def number_of_modes(self) -> int:
        return len(self.plan.rank) if isinstance(self.plan.rank, tuple) else 2


def low_rank_project(
    rank: int | tuple[int, ...] = 128,
    update_interval: int = UPDATE_INTERVAL,
    side: Side = "short",
    method: Method = "power",
    transition: Transition = "rotate",
    stagger: bool | None = None,
    where: Where = hidden_matrices,
    axes: AxesLike = None,
    basis_dtype: Any = None,
    seed: int = 0,
) -> LowRankProject:
    r"""Project the gradient of every selected matrix onto a low-rank subspace of itself.

    For one matrix W of shape (m, n) with gradient G the low-rank gradient is

    .. math:: R = P^\top G, \qquad R = G Q, \qquad\text{or}\qquad R = P^\top G Q,

    with orthonormal P (m, r) and Q (n, r) that span the dominant subspaces of the gradient at the
    last refresh. A parameter with more axes is a batch of matrices, one per index of the other
    axes; with a tuple for ``rank`` it is a tensor with one basis per mode (Tucker). R has the
    dtype of G; products are accumulated in float32, factorisations are float32.

    It opens a subspace: the following transformations in :func:`natgalore_jax.chain`, up to
    :func:`project_back`, receive R instead of G. It is an error alone or in ``optax.chain``, which
    would initialise the other transformations with full shapes.

    Args:
      rank: r, clipped per matrix to its smaller side. A tuple has one entry for each of the last
        ``len(rank)`` axes of the selected parameters, which then have more than two modes.
      update_interval: T, steps between two refreshes of a basis; "online" updates every basis at
        every step.
      side: which side is projected. ``"short"``: the shorter, as in the paper and ``galore-torch``
        "std"; it learns better than the longer side at the same rank. ``"long"``: the longer, as in
        ``optax.contrib.galore``, with the smallest moments. ``"left"`` (rows), ``"right"``
        (columns), ``"both"``. Square matrices: rows.
      method: how a basis is computed. ``"power"``: five block power steps ``P ← polar(G Gᵀ P)``
        from the previous basis plus random directions a tenth as large, or eight steps if the
        previous basis captures too little of G. It needs only matrix products (the polar factor
        ``Y (YᵀY)^(−1/2)`` by Newton–Schulz iteration): many times cheaper than an SVD, and the
        basis moves continuously. Weights in the last step turn the columns towards singular
        vectors, in which Adam learns better. ``"svd"``, ``"eigh"`` (of G Gᵀ): exact.
        ``"randomized"``: randomised SVD. These three call LAPACK on a CPU, and LAPACK and XLA
        oversubscribe the cores: set ``OPENBLAS_NUM_THREADS=1``. ``"gaussian"``: random.
        ``"online"``: a small step of Oja's rule at every training step. A basis that captures too
        little of G restarts at once; directions of G stronger than the weakest in P are inside
        after some hundred steps (in 8 bits perhaps never, because small steps are rounded away).
      transition: transport of basis-dependent state when P changes to P'. ``"rotate"``: first
        moments and history by ``P'ᵀP``, second moments by its squares; ``"reset"``: zero
        (not for ``optax.contrib.adopt``, which divides by the second moment of the last step);
        ``"keep"``: unchanged, as in the published code. :func:`register_state` declares which
        fields of a state are moments; unregistered fields are kept.
      stagger: spread the refreshes of all matrices evenly over the interval, so that no step does
        all of them. None: True. The first refresh of a matrix is at its first gradient.
      where: the parameters to project: a callable ``(path, leaf) -> bool``, a pytree of booleans
        (a prefix of the parameters' tree is enough), or the default :func:`hidden_matrices`.
      axes: a :class:`MatrixAxes`, a pytree of them (None: the default), or a callable of the
        parameters that returns one. Default: the last two axes. Dimension numbers of
        ``optax.contrib`` are taken too; beside them None means "not projected".
      basis_dtype: dtype of the bases; None is the dtype of the parameter. ``"int8"`` or ``"int4"``
        stores codes with a bfloat16 scale for each block of up to 256 numbers, rounded to nearest
        at a refresh. Products use the decoded P in the dtype of the gradient. The error is at most
        half a scale, a 254th (14th) of the largest number of its block, so that P is not exactly
        orthonormal: ‖PᵀP − I‖₂ is 0.01 (0.2). Errors do not add up, because every refresh computes
        an orthonormal basis. docs/memory.md has measurements. "online" cannot use 4 bits, in which
        its small steps are rounded away.
      seed: for the random methods, and the random directions of "power" and "online". Leave it at 0
        for "svd" and "eigh".

    Returns:
      A transformation for :func:`natgalore_jax.chain`, with a :class:`LowRankProjectState`.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value, for "online"
        with four bits, and for arguments without an effect: an interval or ``stagger`` with
        "online", a seed with "svd" and "eigh", ``side`` or ``axes`` with Tucker; at ``init``,
        with the path of the parameter, for a tuple rank on a matrix, axes that overlap or are out
        of range, an integer or complex parameter selected by ``where``, or no parameter selected.
        A zero or non-finite gradient is not an error: it leaves the basis unchanged, and delays the
        first refresh of a matrix.

    References:
      Zhao et al., GaLore (2024), "Adam with GaLore" in appendix B; Halko et al. (2011)
      for "randomized"; Oja (1982) for "online"; LDAdam (2024) for power iteration from the
      previous basis.

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> tx = ng.chain(ng.low_rank_project(rank=2), optax.scale_by_adam(), ng.project_back())
      >>> state = tx.init({"w": jnp.ones((6, 8)), "b": jnp.ones(8)})
      >>> state[0].basis[0]["w"].shape, state[1].mu["w"].shape, state[1].mu["b"].shape
      ((6, 2), (2, 8), (8,))
    """
    check_rank(rank)
    check_interval("update_interval", update_interval)
    check_choice("side", side, Side)
    check_choice("method", method, Method)
    check_choice("transition", transition, Transition)
    if stagger is not None:
        check_boolean("stagger", stagger)
    check_seed(seed)
    if method == "online":
        every_step = 'with method="online", which moves every basis at every step'
        if update_interval != 1:
            check_unused("update_interval", update_interval, UPDATE_INTERVAL, every_step)
        check_unused("stagger", stagger, None, every_step)
        update_interval = 1
    if method in DETERMINISTIC:
        check_unused("seed", seed, 0, f"with method={method!r}, which is deterministic")
    if isinstance(rank, (tuple, list)):
        tucker = "with a tuple for rank, which projects each of the last axes"
        check_unused("side", side, "short", tucker)
        check_unused("axes", axes, None, tucker)
    check_stored_dtype("basis_dtype", basis_dtype)
    if method == "online" and coded_bits(basis_dtype) == 4:
        raise ValueError(
            'method="online" changes the basis by small steps, which rounding to 4 bits loses: '
            'use basis_dtype="int8" or another method'
        )
    rank = int(rank) if not isinstance(rank, (tuple, list)) else tuple(int(r) for r in rank)

    tx = LowRankProject(
        *only_in_chain(
            "low_rank_project changes the shapes of the updates, so that transformations after it "
            "must be initialised inside the subspace: use natgalore_jax.chain(low_rank_project("
            "...), ...) instead of optax.chain or of the bare transformation"
        )
    )
    tx.plan = PlanSettings(rank, where, axes, side)
    tx.refresh = RefreshSettings(
        int(update_interval), method, transition, stagger is not False, int(seed)
    )
    tx.basis_dtype = basis_dtype
    return tx


def only_in_chain(message: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Functions init and update of a transformation that does nothing outside of ``chain``."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        raise ValueError(message)

    # Transformations are tuples of functions: with shared functions two of them would compare equal
    # and jax.jit would confuse them as static arguments. Each gets functions of its own.
    return functools.partial(refuse), functools.partial(refuse)


@kernel("plan", "dtype", inline=False)
def start_factors(plan: LeafPlan, dtype: Any) -> Factors:
    """Orthonormal start for each basis of one parameter."""
    factors = []
    for mode in plan.projected_modes:
        P = start_basis(plan.mode_sizes[mode], plan.rank_of(mode)).astype(dtype)
        P = P.reshape(*plan.mode_shape(mode), plan.rank_of(mode))
        factors.append(jnp.broadcast_to(P, plan.factor_shape(mode)))
    return tuple(factors)
