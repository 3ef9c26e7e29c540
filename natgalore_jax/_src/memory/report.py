"""Bytes of an optimizer's state, from shapes alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from natgalore_jax._src.kernels.stacks import bytes_of
from natgalore_jax._src.memory.attribution import alternatives, attribute
from natgalore_jax._src.memory.compiled_step import StepMemory, bytes_per_device, step_memory
from natgalore_jax._src.memory.table import align, format_bytes
from natgalore_jax._src.params.checks import check_integer
from natgalore_jax._src.params.plan import LeafPlan, record_plans
from natgalore_jax._src.params.where import KeyPath

_TREATMENT = 6  # Columns of the table before those of bytes.
_PARTS = ("basis", "history", "inner", "other")


@dataclasses.dataclass(frozen=True)
class ParameterMemory:
    """One parameter, and the bytes of its optimizer state."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    side: str | None  # "left", "right", "both" or "tucker"; None: not projected
    rank: int | tuple[int, ...] | None
    layers: int  # independent matrices in the parameter, 1 if it is not projected
    weight_bytes: int
    basis_bytes: int
    history_bytes: int  # Gram matrices included
    inner_bytes: int  # moments and other state of optimizers
    other_bytes: int  # memory of the residual
    adamw_bytes: int
    alternatives: Mapping[str, int]  # state_bytes by side; empty if there is no choice

    @property
    def projected(self) -> bool:
        return self.side is not None

    @property
    def state_bytes(self) -> int:
        return sum(getattr(self, f"{part}_bytes") for part in _PARTS)


@dataclasses.dataclass(frozen=True)
class MemoryGroup:
    """Parameters that differ only in their names; ``parameter`` is the first of them."""

    paths: tuple[str, ...]
    parameter: ParameterMemory

    @property
    def count(self) -> int:
        return len(self.paths)


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Result of :func:`memory_report`: one row per parameter, and sums, in bytes.

    ``str(report)`` is a table, :meth:`to_dict` is ready for JSON.
    """

    parameters: tuple[ParameterMemory, ...]  #: in the order of the tree
    shared_bytes: int  #: step counters and other state that belongs to no single parameter
    adamw_state_bytes: int  #: of optax.adamw on the same parameters, counter included
    step: StepMemory | None = None  #: of the compiled step, if one was given

    @property
    def weight_bytes(self) -> int:
        """Sum over the parameters themselves."""
        return sum(p.weight_bytes for p in self.parameters)

    @property
    def total_state_bytes(self) -> int:
        """Sum over all arrays of ``tx.init(params)``."""
        return sum(p.state_bytes for p in self.parameters) + self.shared_bytes

    @property
    def part_bytes(self) -> dict[str, int]:
        """Sum of each part; the sum of all parts is ``total_state_bytes``."""
        sums = {part: sum(getattr(p, f"{part}_bytes") for p in self.parameters) for part in _PARTS}
        return {**sums, "shared": self.shared_bytes}

    @property
    def alternative_state_bytes(self) -> dict[str, int]:
        """Total with all projected matrices on another side; empty without a choice."""
        sides = next((p.alternatives for p in self.parameters if p.alternatives), {})
        return {
            side: sum(p.alternatives.get(side, p.state_bytes) for p in self.parameters)
            + self.shared_bytes
            for side in sides
        }

    @property
    def groups(self) -> tuple[MemoryGroup, ...]:
        """Groups of parameters of the same shape and treatment, in order of appearance."""
        members: dict[str, list[ParameterMemory]] = {}
        for p in self.parameters:
            members.setdefault(repr(dataclasses.replace(p, path="")), []).append(p)
        return tuple(MemoryGroup(tuple(p.path for p in ps), ps[0]) for ps in members.values())

    def to_dict(self) -> dict[str, Any]:
        """The whole report as dicts, lists, strings, integers, booleans and None."""
        return {
            "step": None if self.step is None else self.step.to_dict(),
            "weight_bytes": self.weight_bytes,
            "total_state_bytes": self.total_state_bytes,
            "adamw_state_bytes": self.adamw_state_bytes,
            "part_bytes": self.part_bytes,
            "alternative_state_bytes": self.alternative_state_bytes,
            "groups": [
                {"count": g.count, "paths": list(g.paths), **_treatment(g.parameter)}
                for g in self.groups
            ],
            "parameters": [{"path": p.path, **_treatment(p)} for p in self.parameters],
        }

    def __str__(self) -> str:
        return format_report(self)


def memory_report(
    tx: optax.GradientTransformation,
    params: Any,
    *,
    step: jax.stages.Compiled | None = None,
    live_gradients: int | None = None,
) -> MemoryReport:
    r"""Bytes of an optimizer's state by parameter and part, compared with AdamW's.

    No array is allocated: ``tx.init`` is traced with shapes and dtypes. The total is exactly the
    sum over all leaves of ``tx.init(params)``. For an m × n matrix at rank r, with a history of s
    gradients and a inner states per element (2 for Adam), the state has

    .. math::
      \underbrace{mr}_{\text{basis}} + \underbrace{s\,rn + s^2 + s + 1}_{\text{history}}
      + \underbrace{a\,rn}_{\text{inner}} \;\text{(left)}, \qquad
      nr + s\,mr + s^2 + s + 1 + a\,mr \;\text{(right)},

    numbers, and :math:`(m + n)r + s\,r^2 + s^2 + s + 1 + a\,r^2` with both sides projected. By
    default basis, moments and columns of the history have the dtype of the parameter; the
    :math:`s^2 + s + 1` small numbers have four bytes each. Without a history its terms
    are absent. The compact Fisher matrices of the default, inside and outside the subspace, add
    r + n + 1 numbers of four bytes, the sign of the residual among them.

    The report also has the bytes of alternatives: the state of each projected matrix if its
    shorter, longer, or both sides were projected at the same rank. Basis, history, arrays in the
    shape of the low-rank gradient and the residual's Fisher entries change; other state (the
    factors of Adafactor, full-size moments outside the subspace) does not. Scales of 8-bit moments
    change in proportion, and moments are assumed to stay in 8 bits or too small for them, which is
    not so on both sides of ``min_size`` (by default 4096 numbers, "both" at ranks below 64).

    Given a compiled training step the report also has the gradients, and the activations with the
    working memory of the update. Compile a step from shapes, without allocating arrays, by
    ``jax.jit(train_step, donate_argnums=...).lower(*shapes).compile()``.

    Args:
      tx: any Optax transformation, of this library or not, however nested.
      params: the parameters, or their shapes: arrays, ``jax.ShapeDtypeStruct``, an abstract
        ``nnx.State``. A sharded parameter is counted once, over all its devices.
      step: a compiled training step, for ``report.step``: a :class:`.StepMemory` of one device. On
        CPUs it includes float32 copies of bfloat16 matrices, which the compiler makes.
      live_gradients: the bytes of the gradients that exist at the same time on a device. None (the
        default): gradients of all parameters, in their dtypes and shardings. For
        :func:`.per_layer` give the largest of the embedding part, one layer and the head part.

    Returns:
      A :class:`MemoryReport`. A transformation that does not support ``optax.tree.map_params``
      (``optax.lbfgs``) has its whole state in ``shared_bytes``. A parameter in several subspaces
      shows side and rank of the first and has no alternatives if they differ.

    Raises:
      TypeError: if ``tx`` has no ``init``, or ``step`` is not compiled.
      TypeError, ValueError: if ``live_gradients`` is no integer, negative or without a step.
      ValueError: if the step's backend has no memory analysis.
      TypeError, ValueError: from ``tx.init`` on these parameters.

    Example:
      A matrix of 64 × 256 bfloat16 at rank 8: 64 · 8 numbers of basis, 2 · 8 · 256 of moments.

      >>> import jax, jax.numpy as jnp, natgalore_jax as ng
      >>> params = {"w": jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)}
      >>> report = ng.memory_report(ng.galore_adamw(1e-2, rank=8), params)
      >>> report.part_bytes["basis"], report.part_bytes["inner"], report.adamw_state_bytes
      (1024, 8192, 65540)
      >>> print(report)
      parameter  count   shape     dtype ... Fisher    inner    state    AdamW
      w              1  64×256  bfloat16 ...      -  8.19 kB  9.22 kB  65.5 kB
      (shared)...                                                 8 B
      total          1                   ...      -  8.19 kB  9.22 kB  65.5 kB
      <BLANKLINE>
      state if the side were      now    short     long     both
      w                       9.22 kB  9.22 kB  6.14 kB  5.38 kB
      total                   9.22 kB  9.22 kB  6.15 kB  5.38 kB

      The whole step, with the gradient of w among its temporaries:

      >>> tx = ng.galore_adamw(1e-2, rank=8)
      >>> def train_step(params, state, x):
      ...     grads = jax.grad(lambda p: jnp.square(x @ p["w"]).sum())(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     return jax.tree.map(jnp.add, params, updates), state
      >>> state, x = jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((4, 64), jnp.bfloat16)
      >>> jitted = jax.jit(train_step, donate_argnums=(0, 1))
      >>> compiled = jitted.lower(params, state, x).compile()
      >>> step = ng.memory_report(tx, params, step=compiled).step
      >>> step.gradient_bytes == 64 * 256 * 2, step.argument_bytes
      (True, 42504)
    """
    if not hasattr(tx, "init"):
        raise TypeError(f"memory_report takes a gradient transformation, got {tx!r}")
    if live_gradients is not None:
        check_integer("live_gradients", live_gradients, minimum=0)
        if step is None:
            raise ValueError(f"live_gradients={live_gradients} needs a compiled step=, got None")
    if not (step is None or isinstance(step, jax.stages.Compiled)):
        raise TypeError(
            f"step must be a compiled step, jax.jit(f).lower(*shapes).compile(), got {step!r}"
        )
    whole_step = None
    if step is not None:
        gradients = bytes_per_device(params) if live_gradients is None else live_gradients
        whole_step = step_memory(step, gradients)
    # Explicit shardings would make init need their mesh, and bytes do not depend on them.
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(lambda p: p, params)
    )
    with record_plans() as recorded:
        # eval_shape caches by function and would not record plans again: pass a new function.
        state = jax.eval_shape(lambda p: tx.init(p), params)
    plans: dict[KeyPath, dict[LeafPlan, None]] = {}
    for plan in recorded:
        if plan.projected_modes:
            plans.setdefault(plan.path, {})[plan] = None

    leaves = jax.tree_util.tree_leaves_with_path(params)
    pieces, shared_bytes = attribute(tx, state, jax.tree.structure(params))
    rows = []
    for (path, leaf), own in zip(leaves, pieces, strict=True):
        own_plans = list(plans.get(KeyPath(path), ()))
        plan = own_plans[0] if own_plans else None
        parts = {f"{part}_bytes": sum(p.bytes for p in own if p.part == part) for part in _PARTS}
        rows.append(
            ParameterMemory(
                path=str(KeyPath(path)),
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                side=_side(plan) if plan else None,
                rank=_rank(plan) if plan else None,
                layers=plan.layers if plan else 1,
                weight_bytes=bytes_of(leaf),
                adamw_bytes=2 * bytes_of(leaf),
                alternatives=alternatives(plan, own) if plan and len(own_plans) == 1 else {},
                **parts,
            )
        )
    adamw = jax.eval_shape(optax.adamw(1.0).init, params)
    adamw_bytes = bytes_of(adamw)
    return MemoryReport(tuple(rows), shared_bytes, adamw_bytes, whole_step)


def _side(plan: LeafPlan) -> str:
    if len(plan.modes) > 2:
        return "tucker"
    if len(plan.projected_modes) == 2:
        return "both"
    return "left" if plan.projected_modes == (0,) else "right"


def _rank(plan: LeafPlan) -> int | tuple[int, ...]:
    ranks = tuple(r for r in plan.ranks if r is not None)
    return ranks if len(plan.modes) > 2 else ranks[0]


def _treatment(p: ParameterMemory) -> dict[str, Any]:
    """Fields of a row except its path, for JSON."""
    row: dict[str, Any] = dataclasses.asdict(p)
    row |= {"projected": p.projected, "state_bytes": p.state_bytes}
    row["shape"] = list(p.shape)
    row["rank"] = list(p.rank) if isinstance(p.rank, tuple) else p.rank
    del row["path"]
    return row


def format_report(report: MemoryReport, columns: int | None = None) -> str:
    """Table of groups and total, table of alternative sides, and table of the step.

    The first table is cut in two, treatment and bytes, if it is wider than ``columns``.
    """
    rows = _group_rows(report)
    tables = [align(rows)]
    if columns is not None and max(map(len, tables[0].splitlines())) > columns:
        treatment = [row[:_TREATMENT] for row in rows if any(row[2:_TREATMENT])]
        tables = [align(treatment), align([[row[0], *row[_TREATMENT:]] for row in rows])]
    return "\n\n".join([*tables, *_alternative_block(report), *_step_block(report)])


def _group_rows(report: MemoryReport) -> list[list[str]]:
    rows = [["parameter", "count", "shape", "dtype", "rank", "side"]]
    rows[0] += ["weights", "basis", "Fisher", "inner", "state", "AdamW"]
    for group in report.groups:
        p = group.parameter
        sizes = (p.weight_bytes, p.basis_bytes, p.history_bytes, p.inner_bytes + p.other_bytes)
        rows.append(
            [
                _label(group),
                str(group.count),
                "×".join(map(str, p.shape)) or "scalar",
                p.dtype,
                "×".join(map(str, p.rank)) if isinstance(p.rank, tuple) else str(p.rank or "-"),
                p.side or "-",
                *(_cell(group.count * x) for x in (*sizes, p.state_bytes, p.adamw_bytes)),
            ]
        )
    if report.shared_bytes:
        rows.append(["(shared)", *[""] * 9, _cell(report.shared_bytes), ""])
    parts = report.part_bytes
    sizes = (
        report.weight_bytes,
        parts["basis"],
        parts["history"],
        parts["inner"] + parts["other"],
        report.total_state_bytes,
        report.adamw_state_bytes,
    )
    rows.append(["total", str(len(report.parameters)), *[""] * 4, *map(_cell, sizes)])
    return rows


def _alternative_block(report: MemoryReport) -> list[str]:
    """Table of the state with the short, the long or both sides projected, if there is a choice."""
    totals = report.alternative_state_bytes
    if not totals:
        return []
    sides = ("short", "long", "both")
    rows = [["state if the side were", "now", *sides]]
    for group in report.groups:
        p = group.parameter
        if p.alternatives:
            sizes = (p.state_bytes, *(p.alternatives[side] for side in sides))
            rows.append([_label(group), *(_cell(group.count * x) for x in sizes)])
    total = (report.total_state_bytes, *(totals[side] for side in sides))
    return [align([*rows, ["total", *map(_cell, total)]])]


def _step_block(report: MemoryReport) -> list[str]:
    """Peak of the compiled step on one device, if a step was given."""
    step = report.step
    if step is None:
        return []
    rows = [
        ["a step, on a device", "bytes"],
        ["weights, state, batch", _cell(step.argument_bytes)],
        ["results beside them", _cell(step.result_bytes)],
        ["gradients", _cell(step.gradient_bytes)],
        ["activations, update", _cell(step.activation_bytes)],
        ["total", _cell(step.total_bytes)],
    ]
    if step.host_bytes:
        rows.append(["in host memory", _cell(step.host_bytes)])
    return [align(rows)]


def _cell(count: int) -> str:
    return format_bytes(count) if count else "-"


def _label(group: MemoryGroup) -> str:
    """Name of a group, with a star for keys that differ."""
    names = [path.split("/") for path in group.paths]
    if len({len(name) for name in names}) > 1:
        return f"{group.paths[0]}, …"
    return "/".join(keys[0] if len(set(keys)) == 1 else "*" for keys in zip(*names, strict=True))
