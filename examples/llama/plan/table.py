"""A plan as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from examples.llama.memory.sizes import unit_of

if TYPE_CHECKING:
    from examples.llama.plan.planner import Row

# Columns of bytes, and the parts that each is the sum of.
COLUMNS = {
    "weights": ("weights",),
    "basis": ("basis",),
    "Fisher": ("history",),
    "moments": ("inner",),
    "rest": ("other", "shared", "accumulated", "batch"),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "update": ("update",),
}


def plan_table(title: str, rows: Sequence["Row"], room: int) -> Table:
    """One row for each setting; what fits is green."""
    unit, scale = unit_of(room)
    table = Table(
        title=f"{title}; in {unit}",
        caption="remat: layers are recomputed; per layer: they are updated one by one too; "
        "≥ and ?: too large without the update's own memory",
    )
    table.add_column("optimizer", overflow="fold")
    for name in ("rank", "step", "rows"):
        table.add_column(name, no_wrap=True)
    for name in (*COLUMNS, "total", "room"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        candidate, parts = row.candidate, row.memory.parts
        sizes = {c: sum(parts.get(p, 0) for p in names) for c, names in COLUMNS.items()}
        cells = {c: f"{size / scale:.2f}" if size else "-" for c, size in sizes.items()}
        total, left = (f"{x / scale:.2f}" for x in (row.memory.total, room - row.memory.total))
        if not row.compiled:
            cells["update"], total, left = "?", f"≥ {total}", f"≤ {left}"
        table.add_row(
            candidate.optimizer,
            str(candidate.rank or "-"),
            candidate.step,
            str(candidate.config.batch_size),
            *cells.values(),
            total,
            left,
            style="green" if row.fits(room) else "red",
        )
    return table
