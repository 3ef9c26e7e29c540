"""One suite in the terminal."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.markdown import table
from benchmarks.common.result_files import Json, read_results, read_suite
from benchmarks.pretraining.run_spec import ROOT
from benchmarks.pretraining.step_times import read_times
from benchmarks.pretraining.summary import summarise
from benchmarks.pretraining.tables import losses, protocol, tuning
from benchmarks.pretraining.tuning import tuned_by_preset


@dataclass(frozen=True, kw_only=True)
class Show:
    """Print the tables of one suite, or its runs beside those of another directory."""

    suite: str = "main"
    """Suite whose runs are shown."""
    root: Path = ROOT
    """Directory of all results."""
    reference_suite: str = "main"
    """Suite with the runs of AdamW, if the suite shown has none."""
    against: Path | None = None
    """Another root: each run beside the same run of the same suite there."""


def show(request: Show) -> str:
    """The tables of one suite."""
    records = read_results(request.root, request.suite)
    if request.against is not None:
        return _beside(records, read_results(request.against, request.suite))
    groups = summarise(records, read_suite(request.root, request.reference_suite))
    parts = []
    for preset in dict.fromkeys(preset for preset, _ in groups):
        methods = dict.fromkeys(
            m for (p, _), rows in groups.items() if p == preset for m, _ in rows
        )
        parts.append(f"{preset}: {protocol(groups, preset)}")
        parts.append(losses(groups, preset, methods, read_times(request.root)))
    tuned = tuned_by_preset(records)
    parts += [tuning(t) for t in tuned.values() if any(len(x.curve) > 1 for x in t.values())]
    return "\n\n".join(parts)


def _beside(records: Iterable[Json], others: Iterable[Json]) -> str:
    keys = ("preset", "corpus", "method", "learning_rate", "ratio", "seed")
    theirs = {tuple(r[k] for k in keys): r["test_loss"] for r in others}
    lines = []
    for r in records:
        ours, other = r["test_loss"], theirs.get(tuple(r[k] for k in keys))
        difference = "" if None in (ours, other) else f"{ours - other:+.4f}"
        losses = (
            "diverged" if ours is None else f"{ours:.4f}",
            "" if other is None else f"{other:.4f}",
        )
        lines.append([*(str(r[k]) for k in keys), *losses, difference])
    return table([*keys, "test loss", "there", "difference"], lines)
