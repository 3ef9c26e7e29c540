"""``optax.chain`` with subspaces."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgalore_jax._src.params.dependence import sources_of_outputs
from natgalore_jax._src.states.tree_checks import with_dtypes_of
from natgalore_jax._src.subspace.project import LowRankProject, LowRankProjectState
from natgalore_jax._src.subspace.project_back import ProjectBack, project_back
from natgalore_jax._src.subspace.subspace import NESTED, Subspace, with_residual_error


class Chain(optax.GradientTransformationExtraArgs):
    """Result of :func:`chain`."""

    members: tuple[Any, ...]  # transformations and subspaces, in order


class Composite(Chain):
    """A complete transformation that :func:`chain` splits, to run what follows inside."""

    parts: tuple[Any, ...]  # a LowRankProject and transformations inside its subspace
    closer: ProjectBack
    closer_is_default: bool


def chain(*transforms: Any) -> Chain:
    r"""``optax.chain`` in which low-rank projection works.

    From a :func:`low_rank_project` (or :func:`natural_galore`) to the matching
    :func:`project_back`, every transformation is initialised with and runs on the low-rank tree:
    projected matrices are replaced by their :math:`R`, every other leaf is unchanged, and
    ``params`` is projected too. The moments of any Optax optimizer are then as small as R. A
    subspace that is open at the end is closed there, with the arguments of its ``natural_galore``,
    or with ``project_back()``.

    One subspace may follow another. Without a subspace it is ``optax.chain``.

    A state keeps its dtypes from ``init``, the dtypes of the parameters: bfloat16 moments for
    bfloat16 parameters, also with float32 gradients. (The moments of ``optax.adamw`` become float32
    at the first step, which compiles a second program and is an error in ``jax.lax.scan``.) Second
    moments in bfloat16 of ``optax.scale_by_adam`` never decay at β₂ = 0.999; the ready-made
    optimizers round them stochastically. For float32 moments of bfloat16 parameters use
    ``tx.init(optax.tree.cast(params, jnp.float32))``. Updates have the same dtype as with
    ``optax.chain``, the wider of gradients and state.

    Args:
      *transforms: Optax transformations and the parts of this library. ``optax.MultiSteps``
        inside a subspace accumulates low-rank gradients. The refresh interval must then be a
        multiple of its number of steps, because the accumulated gradients must share a basis, and
        a residual, which needs the mean full gradient, is an error.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` of full-shape updates. Its state is a tuple with
      one entry per transformation, in order; :func:`natural_galore` has the entries of its parts.

    Raises:
      ValueError: for a subspace inside a subspace, a ``project_back`` without a subspace, an
        interval that is not a multiple of the accumulation, or an accumulation with a residual; at
        ``init`` for ``optax.apply_every`` inside a subspace with ``transition="keep"``, and for
        ``optax.flatten`` around moments that a refresh transports, or around natural gradients; at
        ``update`` for a state that was made with other options.
      TypeError: for anything that is not a transformation.

    Example:
      >>> import jax.numpy as jnp, optax, natgalore_jax as ng
      >>> tx = ng.chain(ng.natural_galore(rank=2), optax.adamw(1e-3))
      >>> state = tx.init({"w": jnp.ones((6, 8))})
      >>> optax.tree.get(state, "mu")["w"].shape
      (2, 8)
    """
    members = tuple(_members(transforms))

    def init_fn(params):
        states: list[Any] = []
        for member in members:
            if isinstance(member, Subspace):
                states += member.init(params)
            else:
                states.append(member.init(params))
        return tuple(states)

    def update_fn(updates, state, params=None, **extra_args):
        check_states(members, state)
        return update_members(members, updates, state, params, extra_args)

    tx = Chain(init_fn, update_fn)
    tx.members = members
    return tx


def check_states(members: Sequence[Any], states: Sequence[Any]) -> None:
    """Check the number of states of a chain, and the types that a checkpoint may have lost."""
    sizes = [m.number_of_states if isinstance(m, Subspace) else 1 for m in members]
    if len(states) != sum(sizes):
        raise ValueError(
            f"this chain has {sum(sizes)} states but received {len(states)}; "
            "the state must come from the init of the same chain"
        )
    for member, at in zip(members, itertools.accumulate(sizes, initial=0), strict=False):
        if isinstance(member, Subspace) and not isinstance(states[at], LowRankProjectState):
            raise ValueError(
                f"state {at} of this chain is of type {type(states[at]).__name__} instead of "
                "LowRankProjectState, as after restoring a checkpoint without a target: restore "
                "it with jax.eval_shape(tx.init, params) as the target"
            )


def update_members(
    members: Sequence[Any],
    updates: Any,
    states: Sequence[Any],
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, tuple[Any, ...]]:
    """Update by each member in order, with its own states."""
    new_states: list[Any] = []
    for member in members:
        at = len(new_states)
        if isinstance(member, Subspace):
            own = states[at : at + member.number_of_states]
            updates, own = member.update(updates, own, params, extra_args)
            new_states += own
        else:
            updates, own = member.update(updates, states[at], params, **extra_args)
            new_states.append(with_dtypes_of(states[at], own))
    return updates, tuple(new_states)


def _members(transforms: tuple[Any, ...]) -> list[Any]:
    """Group transformations into members: subspaces, and transformations outside."""
    members: list[Any] = []
    opener: LowRankProject | None = None
    inner: list[Any] = []
    closer: Composite | None = None
    for tx in transforms:
        parts = tx.parts if isinstance(tx, Composite) else (tx,)
        if isinstance(parts[0], LowRankProject):
            if opener is not None:
                raise ValueError(
                    "a subspace is open already: close it with project_back() before the next "
                    "low_rank_project or natural_galore"
                )
            opener, inner = parts[0], list(parts[1:])
            closer = tx if isinstance(tx, Composite) else None
        elif isinstance(tx, ProjectBack):
            if opener is None:
                raise ValueError(
                    "project_back has no subspace to close: put low_rank_project or "
                    "natural_galore before it"
                )
            if closer is not None and not closer.closer_is_default:
                raise ValueError(
                    "natural_galore was given arguments of project_back (scale, residual, ...) and "
                    "is followed by project_back: give them to one of the two"
                )
            members.append(_subspace(opener, inner, tx))
            opener = None
        elif opener is not None:
            inner.append(tx)
        else:
            members.append(optax.with_extra_args_support(_transformation(tx)))
    if opener is not None:
        members.append(_subspace(opener, inner, closer.closer if closer else project_back()))
    return members


def _subspace(opener: LowRankProject, inner: list[Any], closer: ProjectBack) -> Subspace:
    if any(isinstance(m, Subspace) for tx in inner for m in getattr(tx, "members", ())):
        raise ValueError(NESTED)
    inside = tuple(optax.with_extra_args_support(_transformation(tx)) for tx in inner)
    accumulation = _accumulation(inner, opener)
    if accumulation not in (None, 1) and closer.residual is not None:
        raise ValueError(with_residual_error("optax.MultiSteps", closer.residual.rule))
    return Subspace(opener, inside, closer, accumulation)


def _transformation(tx: Any) -> optax.GradientTransformation:
    if isinstance(tx, optax.MultiSteps):
        return tx.gradient_transformation()
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"chain takes gradient transformations, got {tx!r}")
    return tx


def _accumulation(inner: list[Any], opener: LowRankProject) -> int | None:
    """Steps of an ``optax.MultiSteps`` among the inner transformations, if there is one."""
    found = [
        tx if isinstance(tx, optax.MultiSteps) else getattr(tx.update, "__self__", None)
        for tx in inner
    ]
    found = [tx for tx in found if isinstance(tx, optax.MultiSteps)]
    if not found:
        return None
    steps = math.prod(_constant_steps(tx._every_k_schedule) for tx in found)  # not public
    if steps > 1 and any(_may_skip(tx) for tx in found):
        raise ValueError(
            "optax.MultiSteps with should_skip_update_fn inside a subspace would have refreshes in "
            "the middle of an accumulation: put optax.MultiSteps around the chain"
        )
    interval = opener.refresh.update_interval
    if steps > 1 and opener.refresh.method == "online":
        raise ValueError(
            'method="online" moves the basis at every step, so that gradients cannot be '
            "accumulated inside the subspace: put optax.MultiSteps around the chain"
        )
    if interval % steps:
        raise ValueError(
            f"update_interval={interval} must be a multiple of the {steps} steps that "
            "optax.MultiSteps accumulates inside the subspace"
        )
    return steps


def _may_skip(tx: optax.MultiSteps) -> bool:
    """Whether steps may be left out of an accumulation: a function was given, not Optax's own."""
    skip = tx._should_skip_update_fn  # not public
    return not getattr(skip, "__qualname__", "").startswith("MultiSteps.__init__")


def _constant_steps(every_k: Callable[[jax.Array], Any]) -> int:
    """Value of a schedule of ``optax.MultiSteps`` that does not depend on the step."""
    with jax.ensure_compile_time_eval():  # chain may be called inside jit
        step = jnp.zeros([], jnp.int32)
        schedule = jax.make_jaxpr(lambda t: jnp.asarray(every_k(t)))(step)
        if sources_of_outputs(schedule.jaxpr, [1]) != [0]:
            raise ValueError(
                "optax.MultiSteps inside a subspace needs a constant number of steps, got a "
                "schedule that depends on the step: put optax.MultiSteps around the chain"
            )
        return int(jnp.asarray(every_k(step)))
