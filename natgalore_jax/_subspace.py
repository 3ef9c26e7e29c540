"""A subspace: what opens it, what runs inside, what closes it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._check_tree import (
    check_bases,
    check_inner_states,
    check_params,
    flatten_like,
)
from natgalore_jax._companions import find_companions, with_companions
from natgalore_jax._contract import project
from natgalore_jax._plan import LeafPlan, plan_tree, require_projection
from natgalore_jax._project import LowRankProject, LowRankProjectState, start_factors
from natgalore_jax._project_back import ProjectBack, init_back, update_back
from natgalore_jax._refresh import Factors, refresh
from natgalore_jax._scope import open_subspace


@dataclasses.dataclass(frozen=True)
class Subspace:
    """One subspace of a chain. Its states are those of opener, inner transformations, closer."""

    opener: LowRankProject
    inner: tuple[optax.GradientTransformationExtraArgs, ...]
    closer: ProjectBack
    accumulation: int  # steps that an optax.MultiSteps inside gathers before it updates

    @property
    def number_of_states(self) -> int:
        return len(self.inner) + 2

    def init(self, params: Any) -> list[Any]:
        plans = plan_tree(self.opener.plan, params)
        require_projection(self.opener.plan, plans, params)
        leaves, treedef = jax.tree.flatten(params)
        factors = [
            start_factors(plan, self.opener.basis_dtype or leaf.dtype) if plan else ()
            for plan, leaf in zip(plans, leaves, strict=True)
        ]
        opened = LowRankProjectState(
            jnp.zeros([], jnp.int32), self._basis_trees(treedef, plans, factors)
        )
        low_leaves = list(map(low_rank_leaf, plans, leaves, factors))
        low_rank = treedef.unflatten(low_leaves)
        with open_subspace({plan.path: plan for plan in plans if plan}):
            inner = [tx.init(low_rank) for tx in self.inner]
        if self.accumulation == 1 and _holds_multi_steps(inner):
            raise ValueError(
                "optax.MultiSteps inside a subspace must stand in natgalore_jax.chain itself, not "
                "inside another transformation, so that refreshes wait for its steps"
            )
        return [opened, *inner, init_back(self.closer, treedef, plans, low_leaves)]

    def update(
        self, updates: Any, states: Sequence[Any], params: Any, extra_args: dict[str, Any]
    ) -> tuple[Any, list[Any]]:
        opened, *inner_states, closed = states
        columns = [flatten_like(updates, tree, "the parameters at init") for tree in opened.basis]
        if params is not None:
            check_params(updates, params)
        plans = plan_tree(self.opener.plan, updates)
        check_bases(updates, plans, list(zip(*columns, strict=True)))
        check_inner_states(self.inner, inner_states, updates, plans)
        G, treedef = jax.tree.flatten(updates)
        factors = [
            tuple(columns[mode][i] for mode in plan.projected_modes) if plan else ()
            for i, plan in enumerate(plans)
        ]

        factors, inner_states = self._refresh(
            treedef, plans, G, factors, inner_states, opened.count
        )
        R = [project(p, g, f) if p else g for p, g, f in zip(plans, G, factors, strict=True)]
        low_params = None
        if params is not None:
            W = treedef.flatten_up_to(params)
            low_params = treedef.unflatten(
                project(p, w, f) if p else w for p, w, f in zip(plans, W, factors, strict=True)
            )
        low_updates, new_inner = treedef.unflatten(R), []
        for tx, state in zip(self.inner, inner_states, strict=True):
            low_updates, state = tx.update(low_updates, state, low_params, **extra_args)
            new_inner.append(state)

        N = treedef.flatten_up_to(low_updates)
        out, closed = update_back(self.closer, closed, treedef, plans, factors, N, R, G)
        opened = LowRankProjectState(
            optax.safe_increment(opened.count), self._basis_trees(treedef, plans, factors)
        )
        return treedef.unflatten(out), [opened, *new_inner, closed]

    def _refresh(self, treedef, plans, G, factors, inner_states, step):
        """New factors where they are due, and inner states carried over to them."""
        settings = self.opener.refresh
        of_leaf: list[list[Any]] = [[] for _ in plans]
        skeletons = []
        if settings.transition != "keep":
            numbered = treedef.unflatten(range(len(plans)))
            for tx, state in zip(self.inner, inner_states, strict=True):
                found, skeleton = find_companions(tx, state, numbered, plans)
                skeletons.append(skeleton)
                for own, companions in zip(of_leaf, found, strict=True):
                    own.append(companions)
        projected = [i for i, plan in enumerate(plans) if plan]
        new_factors, new_companions = refresh(
            settings,
            [plans[i] for i in projected],
            [G[i] for i in projected],
            [factors[i] for i in projected],
            [of_leaf[i] for i in projected],
            step=step,
            accumulation=self.accumulation,
        )
        for i, f, c in zip(projected, new_factors, new_companions, strict=True):
            factors[i], of_leaf[i] = f, c
        if skeletons:
            inner_states = [
                with_companions(skeleton, [own[k] for own in of_leaf])
                for k, skeleton in enumerate(skeletons)
            ]
        return factors, inner_states

    def _basis_trees(self, treedef, plans, factors) -> tuple[Any, ...]:
        """The state's form of the factors: one tree for each mode."""
        trees = []
        for mode in range(self.opener.number_of_modes):
            column = [
                f[plan.projected_modes.index(mode)]
                if plan and mode in plan.projected_modes
                else optax.MaskedNode()
                for plan, f in zip(plans, factors, strict=True)
            ]
            trees.append(treedef.unflatten(column))
        return tuple(trees)


def _holds_multi_steps(states: list[Any]) -> bool:
    nodes = jax.tree.leaves(states, is_leaf=lambda x: isinstance(x, optax.MultiStepsState))
    return any(isinstance(node, optax.MultiStepsState) for node in nodes)


def low_rank_leaf(plan: LeafPlan | None, leaf: Any, factors: Factors) -> Any:
    """The leaf that the inner transformations are initialised with."""
    if plan is None:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(plan.low_rank_shape, leaf.dtype)
    return project(plan, leaf, factors)
