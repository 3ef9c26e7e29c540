"""A memory report as text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from natgalore_jax._src.memory.report import MemoryGroup, MemoryReport

_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_report(report: "MemoryReport") -> str:
    """One row per group and a total, the same state with other sides projected, and the step."""
    blocks = [align(_group_rows(report)), *_alternative_block(report), *_step_block(report)]
    return "\n\n".join(blocks)


def format_bytes(count: int) -> str:
    """Three significant digits and a decimal unit: 1 kB is 1000 bytes."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0:
        return f"{count} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {_UNITS[unit]}"


def _group_rows(report: "MemoryReport") -> list[list[str]]:
    rows = [["parameter", "count", "shape", "dtype", "rank", "side"]]
    rows[0] += ["weights", "basis", "history", "inner", "state", "AdamW"]
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


def _alternative_block(report: "MemoryReport") -> list[str]:
    """The same state with the short, the long or both sides projected, if any are."""
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


def _step_block(report: "MemoryReport") -> list[str]:
    """What one device holds at the peak of the compiled step, if there is one."""
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
        rows.append(["in the host's memory", _cell(step.host_bytes)])
    return [align(rows)]


def _cell(count: int) -> str:
    return format_bytes(count) if count else "-"


def _label(group: "MemoryGroup") -> str:
    """The names of a group in one: what differs between them is a star."""
    names = [path.split("/") for path in group.paths]
    if len({len(name) for name in names}) > 1:
        return f"{group.paths[0]}, …"
    return "/".join(keys[0] if len(set(keys)) == 1 else "*" for keys in zip(*names, strict=True))


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
