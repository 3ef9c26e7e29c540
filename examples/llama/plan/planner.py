"""Looks for settings that fit into a device's memory."""

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.table import Table

from examples.common import cli
from examples.common.accelerators import find_devices
from examples.common.config import write_json
from examples.common.errors import ConfigError
from examples.common.reporter import Activity, on_stderr
from examples.llama.memory.sizes import format_bytes, parse_bytes, unit_of
from examples.llama.memory.step_memory import (
    StepMemory,
    accelerator_memory,
    live_gradients,
    lower_bound,
    predict,
    resident,
)
from examples.llama.plan.candidates import (
    IN_SUBSPACE,
    Candidate,
    PlanConfig,
    candidates,
    has_residual,
    step_rows,
)
from examples.llama.run_config import run_preset
from examples.llama.training.build import abstract_run


class Row(NamedTuple):
    """A setting and what it takes."""

    candidate: Candidate
    memory: StepMemory
    compiled: bool  # False: the working memory of the update is not counted

    def fits(self, room: int) -> bool:
        return self.compiled and self.memory.total <= room

    def to_dict(self, room: int) -> dict[str, Any]:
        c = self.candidate
        return {
            "optimizer": c.optimizer,
            "rank": c.rank,
            "step": c.step,
            "batch_size": c.config.batch_size,
            "seq_len": c.config.seq_len,
            "command": c.command,
            "bytes": self.memory.to_dict(),
            "compiled": self.compiled,
            "fits": self.fits(room),
        }


class Plan(NamedTuple):
    """Result of a search."""

    rows: list[Row]
    best: Row | None  # that fits
    nearest: Row  # the smallest one


def search(
    groups: Sequence[Sequence[Candidate]],
    room: int,
    everything: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Finds the best setting that takes at most `room` bytes.

    A step is compiled only if it can fit: what stays, and gradients and activations, are known
    before. Within a group the first one that fits ends the search. After it only the same optimizer
    at a higher rank is of interest, unless `everything` is asked for.

    Args:
      groups: settings, from the best to the least good. Optimizers are taken in this order, of
        one optimizer the highest rank, and then again this order.
      room: bytes.
      everything: look at all of them.
      progress: is told what is compiled.
    """
    rows, fitting = [], []
    refused: dict[tuple[str, str], ConfigError] = {}
    for group in groups:
        for candidate in group:
            if not everything and any(_is_worse(candidate, row.candidate) for row in fitting):
                continue
            try:
                row = _row(candidate, room, everything, progress)
            except ConfigError as error:  # An optimizer that the step or the sums do not suit.
                reason = candidate.optimizer, str(error)
                if reason not in refused:  # It is the same for every step.
                    progress(f"left out: {candidate.optimizer}: {error}")
                refused.setdefault(reason, error)
                continue
            rows.append(row)
            if row.fits(room):
                fitting.append(row)
                if not everything:
                    break
    if not rows and refused:
        raise next(iter(refused.values()))
    order = list(dict.fromkeys(c.config.optimizer.name for group in groups for c in group))
    # The first in order; of one optimizer, moments in 8 bits at a higher rank before a lower rank.
    best = min(
        fitting,
        key=lambda row: (
            order.index(row.candidate.config.optimizer.name),
            -(row.candidate.rank or 0),
        ),
        default=None,
    )
    nearest = min(rows, key=lambda row: row.memory.total)
    while best is None and not nearest.compiled:
        # Bounds below are no answer to how much is missing.
        rows[rows.index(nearest)] = _row(nearest.candidate, room, True, progress)
        nearest = min(rows, key=lambda row: row.memory.total)
    return Plan(rows, best, nearest)


def _is_worse(candidate: Candidate, fitting: Candidate) -> bool:
    """Whether a setting is worse than one of an earlier group, which fits."""
    same = candidate.config.optimizer.name == fitting.config.optimizer.name
    return not same or (candidate.rank or 0) <= (fitting.rank or 0)


def most_rows(best: Row, room: int, progress: Callable[[str], None] = lambda text: None) -> Row:
    """The setting with the largest of its batches that take at most `room` bytes.

    Activations grow by the same bytes with every row. Two programs tell how many; the batch is then
    compiled; one that does not fit corrects the estimate.
    """
    first, larger = best.candidate.config.batch_size, best.candidate.larger
    if not larger:
        return best
    probe = min(larger, key=lambda batches: abs(batches.batch_size - 4 * first))
    more = lower_bound(abstract_run(best.candidate.with_batches(probe).config))
    activations = more.parts["activations"] - best.memory.parts["activations"]
    a_row = max(activations / (probe.batch_size - first), 1)
    left = room - best.memory.total
    while larger := [x for x in larger if (x.batch_size - first) * a_row <= left]:
        row = _row(best.candidate.with_batches(larger[-1]), room, False, progress)
        if row.fits(room):
            return row
        a_row = max(a_row, (row.memory.total - best.memory.total) / (larger[-1].batch_size - first))
        larger = larger[:-1]
    return best


def _row(candidate: Candidate, room: int, everything: bool, progress: Callable[[str], None]) -> Row:
    start = time.perf_counter()
    run = abstract_run(candidate.config)
    if not everything:  # Known before anything is compiled.
        gradients = {"gradients": live_gradients(run.params, candidate.config.per_layer)}
        kept = resident(run)._replace(temporary=gradients)
        if kept.total > room:
            return Row(candidate, kept, compiled=False)
    bound = lower_bound(run)
    if bound.total > room and not everything:
        return Row(candidate, bound, compiled=False)
    rank = f", rank {candidate.rank}" if candidate.rank else ""
    rows = candidate.config.batch_size
    what = f"{candidate.optimizer}{rank}, {candidate.step}, batch of {rows}"
    with on_stderr().during(Activity(f"compiling {what}", "at once")):
        memory = predict(candidate.config, run=run)
    seconds = time.perf_counter() - start
    progress(f"compiled {what}: {seconds:.0f} s")
    return Row(candidate, memory, compiled=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    return cli.exit_code(lambda: run(argv, cli.terminal()))


def run(argv: list[str] | None, console: Console) -> int:
    plan, given = cli.parse_known(PlanConfig, "examples.llama.plan", argv)
    given = cli.apart(given)
    find_devices()
    memory, reserve = device_memory(plan.device_memory), _size("reserve", plan.reserve)
    room = memory - reserve
    if room <= 0:
        raise ConfigError(f"--reserve {plan.reserve} is all of {format_bytes(memory)}")
    try:
        groups = list(candidates(plan, given))
    except SystemExit:  # An option that there is not.
        print("of a plan itself: python -m examples.llama.plan --help", file=sys.stderr)
        raise

    def progress(text: str) -> None:
        width = shutil.get_terminal_size().columns
        print(_within(text, width), file=sys.stderr, flush=True)

    found = search(groups, room, plan.all, progress)
    if found.best is not None:
        best = most_rows(found.best, room, progress)
        if best is not found.best:
            found = found._replace(best=best, rows=[*found.rows, best])
    config = found.rows[0].candidate.config
    tokens = [row.candidate.config.tokens_per_step for row in found.rows]
    per_step = " to ".join(f"{n:,}" for n in sorted({min(tokens), max(tokens)}))
    title = (
        f"{config.preset}: {format_bytes(memory)}, {format_bytes(reserve)} of it reserved; rows of "
        f"{config.seq_len} tokens, {per_step} tokens a step"
    )
    console.print(plan_table(title, found.rows, room))
    console.print(verdict(found, room), highlight=False, soft_wrap=True)
    if plan.json is not None:
        rows = [row.to_dict(room) for row in found.rows]
        best = None if found.best is None else found.best.candidate.command
        results = {"device_bytes": memory, "room_bytes": room, "best": best, "settings": rows}
        write_json(plan.json, results)
    if plan.figure is not None:
        # Matplotlib takes a second to import.
        from examples.llama.memory.figure import PAPER_SIZES, breakdown, draw

        draw(breakdown(PAPER_SIZES, progress), plan.figure, memory)
    return 0


# The optimizer with the smallest state.
_LEAN = "lean-natural-galore"


def verdict(plan: Plan, room: int) -> str:
    """The command for the best setting, or by how much the nearest one misses."""
    row = plan.best or plan.nearest
    if plan.best is not None:
        text = f"best that fits, with {format_bytes(room - row.memory.total)} left"
    else:
        misses = format_bytes(row.memory.total - room)
        text = f"nothing of these fits; the nearest misses by {misses}"
    config = row.candidate.config
    rows, preset = step_rows(config), step_rows(run_preset(config.preset))
    if rows != preset:
        unit = "row" if rows == 1 else "rows"
        text += f", {rows} {unit} a step instead of the preset's {preset}"
    text += f":\n{row.candidate.command}"
    lean = f"--optimizers {_LEAN} --ranks {run_preset(config.preset).optimizer.rank // 4}"
    if IN_SUBSPACE[1] in row.candidate.arguments and has_residual(row.candidate.optimizer):
        text += (
            "\nThis is without the residual, whose loss was not measured. With it, at fewer tokens "
            f"a step: {lean} --accumulate 1"
        )
    elif plan.best is None and not row.candidate.optimizer.startswith(_LEAN):
        decided = {"--weight-bits", "--no-per-layer"} & {*row.candidate.arguments}
        bits = "" if decided or config.adapter.kind != "none" else " --weight-bits 8"
        text += f"\nSmaller, at fewer tokens a step: {lean} --accumulate 1{bits}"
    return text


def _within(text: str, width: int) -> str:
    """A text in lines of at most `width` characters, at most three of them."""
    return textwrap.fill(
        text, width, subsequent_indent="  ", break_on_hyphens=False, max_lines=3, placeholder=" ..."
    )


def device_memory(text: str | None) -> int:
    """Bytes of the device: what is said, or what the accelerator has."""
    if text is not None:
        size = _size("device-memory", text)
        if not size:
            raise ConfigError(f"--device-memory must be above 0, got {text!r}")
        return size
    memory = accelerator_memory()
    if memory is None:
        raise ConfigError("there is no accelerator here: say --device-memory, such as 24GB")
    return memory


def _size(option: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--{option}: {error}") from error


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


def plan_table(title: str, rows: Sequence[Row], room: int) -> Group:
    """One row for each setting, and one for its parts; what fits is green."""
    unit, scale = unit_of(room)
    settings = _table(f"{title}; in {unit}")
    settings.caption = (
        "remat: layers are recomputed; per layer: they are updated one by one too; "
        "≥ and ?: too large without the update's own memory"
    )
    parts = _table(f"parts, in {unit}")
    settings.add_column("optimizer", overflow="fold")
    for name in ("rank", "step", "rows"):
        settings.add_column(name, no_wrap=True)
    for table, names in ((settings, ("total", "room")), (parts, COLUMNS)):
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(rows, start=1):
        candidate, found = row.candidate, row.memory.parts
        sizes = {c: sum(found.get(p, 0) for p in names) for c, names in COLUMNS.items()}
        cells = {c: f"{size / scale:.2f}" if size else "-" for c, size in sizes.items()}
        total, left = (f"{x / scale:.2f}" for x in (row.memory.total, room - row.memory.total))
        if not row.compiled:
            cells["update"], total, left = "?", f"≥ {total}", f"≤ {left}"
        style = "green" if row.fits(room) else "red"
        settings.add_row(
            str(number),
            candidate.optimizer,
            str(candidate.rank or "-"),
            candidate.step,
            str(candidate.config.batch_size),
            total,
            left,
            style=style,
        )
        parts.add_row(str(number), *cells.values(), style=style)
    return Group(settings, parts)


def _table(title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("", justify="right", no_wrap=True)
    return table
