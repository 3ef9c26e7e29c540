"""States of several optimizers for the same parameters, side by side."""

from typing import Any

import optax

from natgalore_jax._src.memory.report import MemoryReport, memory_report
from natgalore_jax._src.memory.table import align, format_bytes
from natgalore_jax._src.optimizers.galore import galore_adamw
from natgalore_jax._src.optimizers.natural_galore import (
    lean_natural_galore_adamw,
    natural_galore,
    natural_galore_adamw,
)
from natgalore_jax._src.subspace.chain import chain

_COLUMNS = ("basis", "Fisher", "moments", "state", "of AdamW's", "with weights")


def compare_memory(params: Any, rank: int, side: str) -> dict[str, MemoryReport]:
    """The report of each optimizer, from shapes alone."""
    options: dict[str, Any] = {"rank": rank, "side": side}
    # GaLore's ranks are a quarter of the width.
    lean = options | {"rank": max(1, rank // 4)}
    optimizers = {
        "AdamW": optax.adamw(1.0),
        "GaLore": galore_adamw(1.0, **options),
        "Natural GaLore": natural_galore_adamw(1.0, **options),
        "Natural GaLore, history of 10": chain(natural_galore(**options), optax.adamw(1.0)),
        "Natural GaLore, 8 bits": natural_galore_adamw(1.0, moment_bits=8, **options),
        f"Natural GaLore, lean, rank {lean['rank']}": lean_natural_galore_adamw(1.0, **lean),
    }
    return {name: memory_report(tx, params) for name, tx in optimizers.items()}


def format_comparison(reports: dict[str, MemoryReport]) -> str:
    """One row for each optimizer: its parts, its sum, the ratio to AdamW's."""
    rows = [["optimizer", *_COLUMNS]]
    for name, report in reports.items():
        parts = report.part_bytes
        sizes = (parts["basis"], parts["history"], parts["inner"] + parts["other"])
        total = report.total_state_bytes
        rows.append(
            [
                name.replace("Natural GaLore, ", "  "),
                *(format_bytes(size) if size else "-" for size in (*sizes, total)),
                f"{100 * total / report.adamw_state_bytes:.1f} %",
                format_bytes(total + report.weight_bytes),
            ]
        )
    return align(rows)
