"""Gradients into the subspace."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.basis import METHODS, Method, start_basis
from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.kernels.linear_codes import coded_bits
from natgalore_jax._src.kernels.projection import Factors
from natgalore_jax._src.kernels.rotation import TRANSITIONS, Transition
from natgalore_jax._src.params.axes import AxesLike
from natgalore_jax._src.params.checks import (
    check_boolean,
    check_choice,
    check_integer,
    check_interval,
    check_stored_dtype,
    check_unused,
)
from natgalore_jax._src.params.plan import SIDES, LeafPlan, PlanSettings, Side, check_rank
from natgalore_jax._src.params.where import Where, hidden_matrices
from natgalore_jax._src.refresh.matrix import RefreshSettings
from natgalore_jax._src.states.entries import Part, StateType, register_type

UPDATE_INTERVAL = 200
# They find the same basis whatever the seed.
DETERMINISTIC = ("svd", "eigh")


class LowRankProjectState(NamedTuple):
    """State of :func:`low_rank_project`."""

    count: jax.typing.ArrayLike  #: shape (), int32: steps taken
    #: One tree of parameters per mode: (rows, columns) for matrices, one per axis for Tucker.
    #: Its leaves are batch + mode + (rank,), basis_dtype, or MaskedNode where nothing is projected.
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
        return 2 if isinstance(self.plan.rank, int) else len(self.plan.rank)


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
    r"""Projects the gradient of every selected matrix onto a low-rank subspace of itself.

    For one matrix W of shape (m, n) with gradient G the low-rank gradient is

    .. math:: R = P^\top G, \qquad R = G Q, \qquad\text{or}\qquad R = P^\top G Q,

    with orthonormal P (m, r) and Q (n, r) that span the dominant subspaces of the gradient at the
    last refresh. A parameter with more axes is a batch of matrices, one per index of the other
    axes; with a tuple for ``rank`` it is a tensor with one basis per mode (Tucker). R has the
    dtype of G; products are accumulated in float32, factorisations are float32.

    It opens a subspace: what follows in :func:`natgalore_jax.chain`, up to :func:`project_back`,
    sees R in the place of G. It cannot stand alone or in ``optax.chain``, where the other
    transformations would be initialised with the full shapes.

    Args:
      rank: r, clipped per matrix to its smaller side. A tuple has one entry for each of the last
        ``len(rank)`` axes of the selected parameters, which then have more than two modes.
      update_interval: T, steps between two refreshes of a basis; 1 refreshes at every step, as
        "online" always does.
      side: which side is projected. ``"short"``: the shorter, as in the paper and ``galore-torch``
        "std", which learns better than the longer at the same rank; ``"long"``: the longer, as in
        ``optax.contrib.galore``, with the smallest moments; ``"left"`` (rows), ``"right"``
        (columns), ``"both"``. Square matrices: rows.
      method: how a basis is found. ``"power"``: five block power steps ``P ← polar(G Gᵀ P)`` from
        the previous basis and a tenth of random directions, which find what G has outside of it;
        eight where that basis has nothing of G. Products of matrices alone, with the polar factor
        ``Y (YᵀY)^(−1/2)`` by Newton–Schulz iteration: many times cheaper than an SVD, without
        LAPACK, and the basis moves continuously. Weights in the last step turn the columns towards
        single singular vectors, in which Adam learns better. ``"svd"``, ``"eigh"`` (of G Gᵀ):
        exact; ``"randomized"``: randomised SVD; these call LAPACK on a CPU, where
        ``OPENBLAS_NUM_THREADS=1`` keeps it from taking the cores from XLA. ``"gaussian"``: random,
        needs no gradient. ``"online"``: a small step of Oja's rule at every step of training. A
        basis that has nothing of G starts anew at once; what dominates G where P has something
        weaker is inside after some hundred steps (in eight bits it may never be: its first small
        steps are rounded away).
      transition: what becomes of moments and history when P changes to P'. ``"rotate"``: linear
        ones by ``P'ᵀP``, second moments by its squares; ``"reset"``: zero; ``"keep"``: untouched,
        as in the published code. The type of a state says which of its fields are moments:
        :func:`register_state`. What is not registered is kept.
      stagger: spread the refreshes of all matrices evenly over the interval, so that no step does
        them all. None: True. Apart from that every matrix is refreshed at its first gradient.
      where: the parameters to project: a callable ``(path, leaf) -> bool``, a pytree of booleans
        (a prefix of the parameters' tree is enough), or the default :func:`hidden_matrices`.
      axes: a :class:`MatrixAxes`, a pytree of them (None: the default), or a callable of the
        parameters that returns one. Default: the last two axes.
      basis_dtype: dtype of the bases; None is the dtype of the parameter. ``"int8"`` or ``"int4"``
        stores them in codes, two numbers a byte in four bits, with a bfloat16 scale for each block
        of up to 256, rounded to nearest at a refresh; what is computed uses the decoded P, in the
        dtype of the gradient. An error is at most half a scale, a 254th (14th) of the largest
        number of its block, so that P is no longer quite orthonormal: ‖PᵀP − I‖₂ is 0.01 (0.2).
        Every refresh starts anew from an orthonormal basis, so that errors do not add up.
        docs/memory.md has numbers. Four bits are not for "online", whose small steps they lose.
      seed: for the random methods, and the random directions of "power" and "online". 0 for "svd"
        and "eigh", which have no use for it.

    Returns:
      A transformation for :func:`natgalore_jax.chain`, with a :class:`LowRankProjectState`.

    Raises:
      TypeError, ValueError: at construction for an argument of a wrong type or value, for "online"
        with four bits, and for arguments without an effect: an interval or ``stagger`` with
        "online", a seed with "svd" and "eigh", ``side`` or ``axes`` with Tucker; at ``init``,
        with the path of the parameter, for a tuple rank on a matrix, axes that overlap or are out
        of range, an integer or complex parameter selected by ``where``, or no parameter selected.
        A gradient that is zero or not finite at a refresh leaves the basis as it was; at the first
        refresh of a matrix the next gradient that is neither takes its place.

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
    check_choice("side", side, SIDES)
    check_choice("method", method, METHODS)
    check_choice("transition", transition, TRANSITIONS)
    if stagger is not None:
        check_boolean("stagger", stagger)
    check_integer("seed", seed, minimum=0)
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
            'method="online" changes the basis by small steps, which rounding to four bits loses: '
            'use basis_dtype="int8" or another method'
        )
    rank = int(rank) if not isinstance(rank, (tuple, list)) else tuple(int(r) for r in rank)

    # Two of them are equal if they are one object, as Optax's are: a tuple of functions is equal
    # if its functions are, and jax.jit would take one for the other as a static argument.
    tx = LowRankProject(*(functools.partial(_outside_of_chain) for _ in range(2)))
    tx.plan = PlanSettings(rank, side, where, axes)
    tx.refresh = RefreshSettings(
        int(update_interval), method, transition, stagger is not False, int(seed)
    )
    tx.basis_dtype = basis_dtype
    return tx


def _outside_of_chain(*args: Any, **kwargs: Any) -> Any:
    del args, kwargs
    raise ValueError(
        "low_rank_project changes the shapes of the updates, so that what follows it must be "
        "initialised inside the subspace: use natgalore_jax.chain(low_rank_project(...), ...) "
        "in the place of optax.chain or of the bare transformation"
    )


@own_arithmetic
def start_factors(plan: LeafPlan, dtype: Any) -> Factors:
    """An orthonormal start for each basis of one parameter."""
    factors = []
    for mode in plan.projected_modes:
        P = start_basis(plan.mode_sizes[mode], plan.rank_of(mode)).astype(dtype)
        P = P.reshape(*plan.mode_shape(mode), plan.rank_of(mode))
        factors.append(jnp.broadcast_to(P, plan.factor_shape(mode)))
    return tuple(factors)
