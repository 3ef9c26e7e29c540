"""The generated pages, as Markdown."""

from collections.abc import Iterable, Mapping

from benchmarks.pretraining import tables
from benchmarks.pretraining.methods import METHODS
from benchmarks.pretraining.search import Rates
from benchmarks.pretraining.summary import RECIPE, Group, Row
from benchmarks.pretraining.tuning import Tuned

# The comparison that the project is about; the other methods are in the long tables only.
CORE = (
    "adamw",
    "adamw-one-rate",
    "muon",
    "galore",
    "natural-galore-paper",
    "natural-galore-published",
    "fira",
    "apollo-mini",
    "natural-galore",
)
PLANNED = ("nano", "9m", "60m")

Groups = Mapping[Group, Mapping[tuple[str, Rates], Row]]


def short(groups: Groups, picture: str, link: str) -> str:
    """The methods that the comparison is about, and one plot."""
    parts = []
    for preset in _presets(groups):
        parts += [f"**{preset}**: {protocol(groups, preset)}", *_losses(groups, preset, CORE)]
    parts.append(picture)
    parts.append(f"All methods, rates and further plots: [{link}]({link}).")
    return "\n\n".join(parts)


def long_page(
    groups: Groups,
    tuned: Mapping[str, Mapping[str, Tuned]],
    pictures: Mapping[str, str],
) -> str:
    """Everything there is to see."""
    parts = [
        "# Comparison of optimizers",
        "Made by `python -m benchmarks.pretraining report` from the files in "
        "`benchmarks/results/quality`; do not edit. "
        "[benchmarks/README.md](../benchmarks/README.md#pretraining) says how the runs are made.",
    ]
    for preset in _presets(groups):
        parts += [f"## {preset}", protocol(groups, preset), *_losses(groups, preset, METHODS)]
        for corpus in sorted(c for p, c in groups if p == preset):
            rows = groups[preset, corpus].values()
            parts.append(f"Validation loss along the run on {corpus}, mean over seeds:")
            parts.append(tables.course(rows))
            lines = tables.verdicts(rows)
            if lines:
                ours = tables.label(RECIPE)
                parts.append(f"Test loss of {ours} on {corpus}, mean over seeds:")
                parts.append("\n".join(f"- {line}" for line in lines))
    parts += ["## Curves", *(pictures[name] for name in ("steps", "time", "size"))]
    parts.append("## Learning rates")
    for preset, of_preset in tuned.items():
        parts.append(
            f"Tuning at {preset}: final validation loss, mean over corpora and seeds. The rate is "
            "that of the hidden matrices, the ratio that of the other parameters' rate to it."
        )
        parts.append(tables.tuning(of_preset))
    parts += [text for name, text in pictures.items() if name.startswith("learning-rate")]
    return "\n\n".join(parts) + "\n"


def _losses(groups: Groups, preset: str, methods: Iterable[str]) -> list[str]:
    if not any(p == preset for p, _ in groups):
        return []
    run = {method for (p, _), rows in groups.items() if p == preset for method, _ in rows}
    listed = [m for m in methods if m in run or m in CORE]
    changed = sorted(run - set(listed) - set(METHODS))
    return [tables.losses(groups, preset, [*listed, *changed])]


def protocol(groups: Groups, preset: str) -> str:
    """How the runs of a preset were made."""
    rows = [row for (p, _), of in groups.items() if p == preset for row in of.values()]
    if not rows:
        return "not run."
    seeds = max(len(row.seeds) for row in rows)
    shared = sorted({w for row in rows for w in row.workers})
    at_a_time = " or ".join(map(str, shared))
    plural = "" if seeds == 1 else "s"
    return (
        f"{rows[0].steps} steps, {seeds} seed{plural}, mean ± standard deviation of the test loss "
        f"in nats per token; times with {at_a_time} run{'' if shared == [1] else 's'} at a time."
    )


def _presets(groups: Groups) -> list[str]:
    return list(dict.fromkeys([*PLANNED, *(preset for preset, _ in groups)]))
