"""A subspace: opener, inner transformations, closer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.kernels.kernel import kernel, own_arithmetic
from natgalore_jax._src.kernels.linear_codes import (
    LinearCodes,
    bits_of,
    coded_bits,
    encode,
    leaves_of,
    load,
    relative_error,
    tree_of,
)
from natgalore_jax._src.kernels.projection import Factors, project, project_to_stored
from natgalore_jax._src.params.context import current_subspace, open_subspace
from natgalore_jax._src.params.placement import (
    AxisName,
    has_explicit_sharding,
    place_factor,
    vary,
    varying_axes,
)
from natgalore_jax._src.params.plan import LeafPlan, PlanSettings, plan_tree, require_projection
from natgalore_jax._src.refresh.matrix import StoredFactors
from natgalore_jax._src.refresh.refresh import refresh
from natgalore_jax._src.states.entries import check_entries
from natgalore_jax._src.states.transport import find_basis_states, put_back
from natgalore_jax._src.states.tree_checks import (
    check_bases,
    check_inner_states,
    check_low_rank,
    check_params,
    flatten_like,
    known_at_init,
    other_options,
    with_dtypes_of,
)
from natgalore_jax._src.subspace.project import LowRankProject, LowRankProjectState, start_factors
from natgalore_jax._src.subspace.project_back import (
    ProjectBack,
    clipped_matrices,
    init_back,
    update_back,
)

NESTED = (
    "a subspace inside a subspace: a refresh would not transport the inner bases; put an optimizer "
    "with a subspace of its own after project_back, or give it other parameters by optax.partition"
)
LINE_SEARCHES = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)


@dataclasses.dataclass(frozen=True)
class Subspace:
    """One subspace of a chain; its states are opener, inner transformations and closer."""

    opener: LowRankProject
    inner: tuple[optax.GradientTransformationExtraArgs, ...]
    closer: ProjectBack
    accumulation: int | None  # steps of an optax.MultiSteps inside
    # Shapes of inner states by the tree that they are for.
    known_states: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def number_of_states(self) -> int:
        return len(self.inner) + 2

    def init(self, params: Any) -> list[Any]:
        if current_subspace() is not None:
            raise ValueError(NESTED)
        treedef = jax.tree.structure(params)
        plans, opened, low_leaves = self._start(params)
        clipped_matrices(self.closer, self.opener.plan, params)  # for errors and record_plans
        low_rank = treedef.unflatten(low_leaves)
        with open_subspace(plans):
            inner = [tx.init(low_rank) for tx in self.inner]
        if self.accumulation is None and _holds(optax.MultiStepsState, inner):
            raise ValueError(
                "optax.MultiSteps inside a subspace must be an argument of natgalore_jax.chain, "
                "not inside another transformation, so that refreshes fall on its multiples"
            )
        if any(_holds(kind, inner) for kind in LINE_SEARCHES):
            raise ValueError("a line search is inside a subspace: put it after project_back")
        keeps = self.opener.refresh.transition == "keep"
        if _holds(optax.ApplyEvery, inner):
            if self.closer.residual is not None:
                raise ValueError(
                    with_residual_error("optax.apply_every", self.closer.residual.rule)
                )
            if keeps:
                raise ValueError(
                    'optax.apply_every inside a subspace with transition="keep" would sum updates '
                    "in different bases: put it after project_back, or use optax.MultiSteps as an "
                    "argument of natgalore_jax.chain"
                )
        if not keeps:
            check_entries(
                inner,
                low_rank,
                "transported at a refresh",
                'leave out optax.flatten, or set transition="keep"',
            )
        self.known_states.update(known_at_init(params, plans, inner))
        return [opened, *inner, init_back(self.closer, treedef, plans, low_leaves)]

    @own_arithmetic
    def _start(self, params):
        """Plans, initial state of the opener, and the leaves in low-rank coordinates."""
        bits = coded_bits(self.opener.basis_dtype)
        dtype = self.opener.basis_dtype if bits is None else jnp.float32
        plans, factors = _starts(self.opener.plan, params, dtype)
        leaves, treedef = jax.tree.flatten(params)
        low_leaves = list(map(low_rank_leaf, plans, leaves, factors))
        stored = [
            _stored(plan, bits, f, leaf) if plan else ()
            for plan, f, leaf in zip(plans, factors, leaves, strict=True)
        ]
        opened = LowRankProjectState(
            jnp.zeros([], jnp.int32), self._basis_trees(treedef, plans, stored, bits is not None)
        )
        return plans, opened, low_leaves

    def update(
        self, updates: Any, states: Sequence[Any], params: Any, extra_args: dict[str, Any]
    ) -> tuple[Any, list[Any]]:
        """:meth:`refresh`, :meth:`project` and :meth:`update_from_low_rank` in one."""
        opened = self._open(updates, states, params)
        inner_states = self._refresh(opened, updates, states)
        factors = opened.factors(updates)
        low = opened.project(updates, factors)
        return self._update(
            opened,
            factors,
            low,
            [states[0], *inner_states, states[-1]],
            params,
            updates,
            extra_args,
        )

    def refresh(
        self,
        grads: Any,
        states: Sequence[Any],
        axis_name: AxisName | None = None,
        is_scheduled: jax.typing.ArrayLike = True,
    ) -> list[Any]:
        """States with refreshed bases and transported basis-dependent state; the count stays.

        With ``is_scheduled=False`` only matrices without a gradient so far are due for a refresh.
        """
        opened = self._open(grads, states)
        inner_states = self._refresh(opened, grads, states, axis_name, is_scheduled)
        return [self._closed(opened, states[0]), *inner_states, states[-1]]

    def project(self, grads: Any, states: Sequence[Any]) -> Any:
        """The low-rank tree of the gradients, linear in them."""
        opened = self._open(grads, states)
        return opened.project(grads, opened.factors(grads))

    def update_from_low_rank(
        self, low: Any, states: Sequence[Any], params: Any, full: Any, extra_args: dict[str, Any]
    ) -> tuple[Any, list[Any]]:
        """Full-shape updates, and the states of the next step.

        ``full`` is the gradient whose projection is ``low``; without a residual it may be None.
        """
        opened = self._open(params, states)
        check_low_rank(low, params, opened.plans)
        if full is not None:
            check_params(full, params)
        factors = opened.factors(params if full is None else full, low)
        return self._update(opened, factors, low, states, params, full, extra_args)

    def _open(self, updates: Any, states: Sequence[Any], params: Any = None) -> "_Opened":
        """Plans and stored bases for a full-shape tree, checked against ``init``."""
        opener, *inner_states, _ = states
        columns = _by_mode(
            opener, lambda tree: flatten_like(updates, tree, "the parameters at init")
        )
        if len(columns) != self.opener.number_of_modes:
            raise ValueError(
                f"bases of {self.opener.number_of_modes} modes are needed, but the state has "
                f"{len(columns)}: {other_options('rank')}"
            )
        check_params(updates, params)
        plans = plan_tree(self.opener.plan, updates)
        dtype = self.opener.basis_dtype
        check_bases(updates, plans, list(zip(*columns, strict=True)), dtype)
        check_inner_states(self.inner, inner_states, updates, plans, self.known_states)
        stored: list[StoredFactors] = [
            tuple(columns[mode][i] for mode in plan.projected_modes) if plan else ()
            for i, plan in enumerate(plans)
        ]
        return _Opened(jax.tree.structure(updates), plans, stored)

    def _refresh(self, opened, grads, states, axis_name=None, is_scheduled=True):
        """Refresh the bases in ``opened``; returns the transported inner states."""
        opener, *inner_states, _ = states
        plans, G = opened.plans, jax.tree.leaves(grads)
        settings, of_leaf, skeleton = self.opener.refresh, [{} for _ in plans], None
        if settings.transition != "keep":
            of_leaf, skeleton = find_basis_states(inner_states, opened.treedef, plans)
        projected = [i for i, plan in enumerate(plans) if plan]
        new_factors, new_states = refresh(
            settings,
            [plans[i] for i in projected],
            [G[i] for i in projected],
            [opened.stored[i] for i in projected],
            [of_leaf[i] for i in projected],
            step=opener.count,
            accumulation=self.accumulation or 1,
            axis_name=axis_name,
            is_scheduled=is_scheduled,
        )
        for i, f, c in zip(projected, new_factors, new_states, strict=True):
            opened.stored[i], of_leaf[i] = f, c
        return inner_states if skeleton is None else put_back(skeleton, of_leaf)

    def _update(self, opened, factors, low, states, params, full, extra_args):
        """Update by the inner transformations on the low-rank tree, and project back."""
        opener, *inner_states, closed = states
        low_params = None if params is None else opened.project(params, factors)
        updates, new_inner = low, []
        for tx, state in zip(self.inner, inner_states, strict=True):
            with open_subspace(opened.plans):
                updates, new_state = tx.update(updates, state, low_params, **extra_args)
            new_inner.append(with_dtypes_of(state, new_state))

        assert full is not None or self.closer.residual is None, "a residual needs full"
        N, R, G = map(
            opened.treedef.flatten_up_to, (updates, low, params if full is None else full)
        )
        basis = opener.basis
        error = relative_error(bits_of(basis)) if isinstance(basis, LinearCodes) else 0.0
        matrices = clipped_matrices(self.closer, self.opener.plan, opened.treedef.unflatten(G))
        out, closed = update_back(
            self.closer, closed, opened.treedef, opened.plans, matrices, factors, *(N, R, G), error
        )
        opener = self._closed(opened, opener)
        opener = opener._replace(count=optax.safe_increment(opener.count))
        return opened.treedef.unflatten(out), [opener, *new_inner, closed]

    def _closed(self, opened: "_Opened", opener: LowRankProjectState) -> LowRankProjectState:
        """State of the opener with the bases of ``opened``."""
        is_coded = isinstance(opener.basis, LinearCodes)
        trees = self._basis_trees(opened.treedef, opened.plans, opened.stored, is_coded)
        return opener._replace(basis=trees)

    def _basis_trees(self, treedef, plans, factors, is_coded) -> Any:
        """Layout of the factors in the state: one tree for each mode."""
        trees = []
        for mode in range(self.opener.number_of_modes):
            column = [
                f[plan.projected_modes.index(mode)]
                if plan and mode in plan.projected_modes
                else optax.MaskedNode()
                for plan, f in zip(plans, factors, strict=True)
            ]
            trees.append(tree_of(treedef, column, is_coded))
        return LinearCodes(*zip(*trees, strict=True)) if is_coded else tuple(trees)


@dataclasses.dataclass
class _Opened:
    """Plans and bases of a tree of parameters, by leaf."""

    treedef: Any
    plans: list[LeafPlan | None]
    stored: list[StoredFactors]  # arrays or codes

    def factors(self, tree: Any, low: Any = None) -> list[Any]:
        """The bases of each leaf as arrays, sharded for a product with the leaf of ``tree``.

        Codes are decoded in the dtype of the gradient, ``low`` or ``tree``.
        """
        leaves = self.treedef.flatten_up_to(tree)
        gradients = leaves if low is None else self.treedef.flatten_up_to(low)
        return [
            _loaded(plan.unnamed, jnp.result_type(R), own, leaf)
            if plan and (has_explicit_sharding(leaf) or isinstance(own[0], LinearCodes))
            else own
            for plan, leaf, R, own in zip(self.plans, leaves, gradients, self.stored, strict=True)
        ]

    def project(self, tree: Any, factors: Sequence[Factors]) -> Any:
        """Project a full-shape tree."""
        return self.treedef.unflatten(
            project_to_stored(plan.unnamed, x, f) if plan else x
            for plan, x, f in zip(
                self.plans, self.treedef.flatten_up_to(tree), factors, strict=True
            )
        )


@kernel("plan", "dtype")
def _loaded(plan: LeafPlan, dtype: Any, stored: StoredFactors, leaf: jax.Array) -> Factors:
    """Decode the bases of one parameter, and shard them for a product with it."""
    modes, nb = plan.projected_modes, len(plan.batch)
    return tuple(
        place_factor(plan, i, load(P, plan.factor_shape(i), dtype, nb), leaf, stored=False)
        for i, P in zip(modes, stored, strict=True)
    )


def _by_mode(opened: LowRankProjectState, flatten: Any) -> list[list[Any]]:
    """Stored factors by mode and leaf."""
    basis = opened.basis
    trees = map(LinearCodes, *basis) if isinstance(basis, LinearCodes) else basis
    return [leaves_of(flatten, tree) for tree in trees]


def _holds(kind: type, states: list[Any]) -> bool:
    nodes = jax.tree.leaves(states, is_leaf=lambda x: isinstance(x, kind))
    return any(isinstance(node, kind) for node in nodes)


def with_residual_error(what: str, rule: str) -> str:
    return (
        f"{what} inside a subspace updates with the sum of several gradients, but "
        f"project_back(residual={rule!r}) would add the residual of each single gradient: put "
        "optax.MultiSteps around the whole chain, split the chain by "
        "natgalore_jax.training.low_rank_steps, or use residual='none'"
    )


def low_rank_leaf(
    plan: LeafPlan | None, leaf: Any, factors: Factors, project: Any = project_to_stored
) -> Any:
    """The leaf for ``init`` of the inner transformations, sharded as ``project`` shards R."""
    if plan is None:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(plan.low_rank_shape, leaf.dtype)
    return project(plan, leaf, factors)


def init_low_rank(
    settings: PlanSettings, inner: optax.GradientTransformation, params: Any
) -> tuple[list[LeafPlan | None], list[Factors], Any]:
    """Plans and starts of the bases of ``params``, and the state of ``inner`` on the low-rank tree.

    For optimizers with projections of their own; bases and R are sharded for products.
    """
    if current_subspace() is not None:
        raise ValueError(NESTED)
    plans, factors = _starts(settings, params)
    leaves, treedef = jax.tree.flatten(params)
    factors = [
        _placed(plan, own, leaf, stored=False) if plan else ()
        for plan, own, leaf in zip(plans, factors, leaves, strict=True)
    ]
    low = (low_rank_leaf(*x, project) for x in zip(plans, leaves, factors, strict=True))
    with open_subspace(plans):
        return plans, factors, inner.init(treedef.unflatten(low))


def _starts(
    settings: PlanSettings, params: Any, dtype: Any = None
) -> tuple[list[LeafPlan | None], list[Factors]]:
    """Plans of the parameters, and starts of the bases, by default in the parameters' dtypes."""
    plans = plan_tree(settings, params)
    require_projection(settings, plans, params)
    return plans, [
        start_factors(plan.unnamed, dtype or jnp.result_type(leaf)) if plan else ()
        for plan, leaf in zip(plans, jax.tree.leaves(params), strict=True)
    ]


def _stored(plan: LeafPlan, bits: int | None, factors: Factors, leaf: Any) -> StoredFactors:
    """The bases of one parameter as floats or codes, sharded for storage."""
    stored: StoredFactors = factors
    if bits is not None:
        stored = tuple(encode(P, bits, len(plan.batch)) for P in factors)
    return _placed(plan, stored, leaf, stored=True)


def _placed(plan: LeafPlan, factors: StoredFactors, leaf: Any, *, stored: bool) -> Any:
    """The bases of one parameter, or their codes, sharded for storage or for products."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return factors
    placed = tuple(
        jax.tree.map(lambda x, mode=mode: place_factor(plan, mode, x, leaf, stored=stored), P)
        for mode, P in zip(plan.projected_modes, factors, strict=True)
    )
    return vary(placed, varying_axes(leaf))
