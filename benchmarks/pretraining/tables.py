"""The results as Markdown: tables, and the generated pages."""

import math
from collections.abc import Iterable, Mapping

from benchmarks.common.markdown import PLUS_MINUS, table
from benchmarks.pretraining.corpora import title_of
from benchmarks.pretraining.methods import CHANGES, METHODS, place
from benchmarks.pretraining.presets import PRESETS
from benchmarks.pretraining.step_times import Seconds
from benchmarks.pretraining.summary import RECIPE, REFERENCE, Group, Row, best, separated
from benchmarks.pretraining.tuning import Rates, Tuned

NOT_RUN = "not run"
Groups = Mapping[Group, Mapping[tuple[str, Rates], Row]]


def losses(
    groups: Groups,
    preset: str,
    methods: Iterable[str],
    seconds: Seconds | None = None,
    *,
    beside: Iterable[Group] | None = None,
) -> str:
    """Final test losses of a preset, for ``methods`` and, in an unfinished table, "not run".

    With ``beside`` the losses of these other groups stand instead of rates, steps and times.
    """
    of_step = {} if seconds is None else seconds.get(preset, {})
    corpora = sorted(corpus for p, corpus in groups if p == preset)
    rows = {corpus: list(groups[preset, corpus].values()) for corpus in corpora}
    others = [groups[group] for group in beside or ()]
    seeds = _seeds(row for of_corpus in rows.values() for row in of_corpus)
    reference = next((r for of in rows.values() for r in of if r.method == REFERENCE), None)
    header = ["", "rate × ratio", "state, MiB", "of AdamW's"]
    header += [f"test loss, {title_of(c)}" for c in corpora]
    header += [f"test loss, {other}, {title_of(c)}" for other, c in beside or ()]
    header += [f"steps to AdamW's loss, {title_of(c)}" for c in corpora]
    header.append("ms a step")
    lines = []
    for method, rates in _keys(rows.values(), methods):
        found = [
            next((r for r in rows[c] if r.method == method and rates in (None, r.rates)), None)
            for c in corpora
        ]
        present = [r for r in found if r is not None]
        if not present:
            lines.append([label(method), *[NOT_RUN] * (len(header) - 1)])
            continue
        lines.append(
            [
                label(method),
                str(rates),
                f"{present[0].state_bytes / 2**20:.2f}",
                _share(present[0], reference),
                *(_loss(r, seeds) for r in found),
                *(_loss(best(of.values(), method), _seeds(of.values())) for of in others),
                *(_steps(r) for r in found),
                f"{1e3 * of_step[method]:.0f}" if method in of_step else "not timed",
            ]
        )
    kept = range(len(header))
    if beside is not None:
        kept = [0, *range(2, 4 + len(corpora) + len(others))]
    return table([header[i] for i in kept], ([line[i] for i in kept] for line in lines))


def verdicts(rows: Iterable[Row]) -> list[str]:
    """The default against the other methods of a group, a line for each verdict."""
    rows = list(rows)
    ours = best(rows, RECIPE)
    if ours is None or ours.diverged:
        return []
    methods: dict[str, list[str]] = {}
    for other in rows:
        if other.method == RECIPE:
            continue
        verdict = "the standard deviations overlap"
        if other.diverged:
            verdict = "diverged"
        elif separated(ours, other):
            verdict = "lower by more than the standard deviations"
        elif separated(other, ours):
            verdict = "higher by more than the standard deviations"
        elif None in (ours.test_std, other.test_std):
            verdict = "one seed"
        difference = "" if other.diverged else f" {ours.test - other.test:+.3f}"
        methods.setdefault(verdict, []).append(f"{label(other.method)}{difference}")
    return [f"{verdict}: {'; '.join(others)}" for verdict, others in methods.items()]


def tuning(tuned: Mapping[str, Tuned], *, brief: bool = False) -> str:
    """The tuned rates and their loss, the points and seeds that found them, and all points.

    ``brief`` leaves out the last, which the figure of the rates shows.
    """
    lines = []
    for method in sorted(tuned, key=place):
        found = tuned[method]
        edge = " (at the edge)" if found.at_edge else ""
        best_rates = f"**{found.rates}**{edge}"
        counts = [str(len(found.curve)), str(found.seeds)]
        line = [label(method), best_rates, f"{found.loss:.3f}", *counts]
        if not brief:
            runs = (
                f"{rates}: {'diverged' if loss is None else f'{loss:.3f}'}"
                for rates, loss in sorted(found.curve.items())
            )
            line.append("; ".join(runs))
        lines.append(line)
    header = ["", "best rate × ratio", "loss", "points", "seeds"]
    return table(header if brief else [*header, "all points"], lines)


def label(method: str) -> str:
    """Label of a method in a table, with the arguments that were changed."""
    name, at, changes = method.partition("@")
    text = METHODS[name].label if name in METHODS else name
    return f"{text}, {CHANGES.get(method, changes.replace(',', ', '))}" if at else text


def _keys(rows: Iterable[Iterable[Row]], methods: Iterable[str]) -> list[tuple[str, Rates | None]]:
    """Method and rates of each line; a method that was not run has none."""
    rates: dict[str, set[Rates]] = {}
    for of_corpus in rows:
        for row in of_corpus:
            rates.setdefault(row.method, set()).add(row.rates)
    return [
        (method, pair) for method in methods for pair in sorted(rates.get(method, ())) or (None,)
    ]


def _seeds(rows: Iterable[Row]) -> int:
    """The number of seeds of a complete row."""
    return max(len(row.seeds) for row in rows)


def _share(row: Row, reference: Row | None) -> str:
    if reference is None:
        return "not known"
    return f"{100 * row.state_bytes / reference.state_bytes:.0f} %"


def _loss(row: Row | None, seeds: int) -> str:
    if row is None:
        return NOT_RUN
    if row.diverged:
        return f"diverged ({row.diverged} of {len(row.seeds)})"
    spread = "" if row.test_std is None else f"{PLUS_MINUS}{row.test_std:.3f}"
    fewer = "" if len(row.seeds) == seeds else f" ({len(row.seeds)} of {seeds} seeds)"
    return f"{row.test:.3f}{spread}{fewer}"


def _steps(row: Row | None) -> str:
    if row is None:
        return NOT_RUN
    if row.diverged:
        return "diverged"
    if row.to_reference is None:
        return "not known"
    return "not reached" if math.isinf(row.to_reference) else f"{100 * row.to_reference:.0f} %"


# The comparison that the project is about; the other methods are in the long tables only.
CORE = (
    "adamw",
    "adamw-clipped",
    "muon",
    "scale",
    "galore",
    "fira",
    "racs",
    "natural-galore",
    "natural-galore-lean",
)
PLANNED = ("nano", "9m", "60m")


def short(groups: Groups, link: str) -> str:
    """The methods that the comparison is about: state at the first preset, losses at all."""
    first, *others = [p for p in _presets(groups) if any(p == preset for preset, _ in groups)]
    beside = [group for group in groups if group[0] in others]
    protocols = [f"**{first}**: {protocol(groups, first, brief=True)}"]
    for preset in others:
        rows = [row for group in beside if group[0] == preset for row in groups[group].values()]
        protocols.append(f"**{preset}**: {rows[0].steps} steps, {_seeds(rows)} seeds.")
    missing = ", ".join(p for p in _presets(groups) if p not in (first, *others))
    link = f"All methods, rates, times and curves: [{link}]({link})."
    return "\n\n".join(
        [
            " ".join(protocols),
            losses(groups, first, CORE, beside=beside),
            f"Not run: {missing}. {link}" if missing else link,
        ]
    )


def long_page(
    groups: Groups,
    tuned: Mapping[str, Mapping[str, Tuned]],
    pictures: Mapping[str, str],
    seconds: Seconds,
) -> str:
    """Everything there is to see."""
    parts = [
        "# Comparison of optimizers",
        "Which optimizer has the lowest loss, and how much state? Every method has two rates of "
        "its own, tuned by the same search, several seeds, and a test split that tuning did not "
        "see.",
        "Made by `python -m benchmarks.pretraining report` from the files in "
        "`benchmarks/results/quality`; do not edit. "
        "[benchmarks/README.md](../benchmarks/README.md#pretraining) says how the runs are made.",
    ]
    for preset in _presets(groups):
        parts += [f"## {preset}", protocol(groups, preset)]
        parts += _losses(groups, preset, METHODS, seconds)
        for corpus in sorted(c for p, c in groups if p == preset):
            rows = groups[preset, corpus].values()
            lines = verdicts(rows)
            if lines:
                parts.append(
                    f"Test loss of {label(RECIPE)} minus that of others, {title_of(corpus)}, means:"
                )
                parts.append("\n".join(f"- {line}" for line in lines))
    parts += ["## Curves", *(pictures[n] for n in ("steps", "time", "size") if n in pictures)]
    parts += [
        "## Learning rates",
        "Final validation losses of tuning. The rate is the rate of the hidden matrices, the ratio "
        "the rate of the other parameters over it. `python -m benchmarks.pretraining show --suite "
        "tune` prints all runs.",
    ]
    compared = {row.method for rows in groups.values() for row in rows.values()}
    for preset, of_preset in tuned.items():
        parts.append(f"{preset}:")
        found = {m: found for m, found in of_preset.items() if m in compared}
        parts += [tuning(found, brief=True), pictures[f"learning-rate-{preset}"]]
    return "\n\n".join(parts) + "\n"


def _losses(groups: Groups, preset: str, methods: Iterable[str], seconds: Seconds) -> list[str]:
    if not any(p == preset for p, _ in groups):
        return []
    run = {method for (p, _), rows in groups.items() if p == preset for method, _ in rows}
    listed = [m for m in methods if m in run]
    changed = sorted(run - set(listed) - set(METHODS))
    missing = "; ".join(label(m) for m in CORE if m not in run)
    parts = [losses(groups, preset, [*listed, *changed], seconds)]
    return [*parts, f"Not run: {missing}."] if missing else parts


_CLIPPED = (
    ". Natural GaLore, default and lean, and methods called clipped clip the leading singular "
    "value of their updates: [from a start in the "
    "subspace](mathematics.md#the-leading-singular-value) in Natural GaLore, from random numbers "
    "by four power iterations in the others"
)


def protocol(groups: Groups, preset: str, *, brief: bool = False) -> str:
    """Protocol of the runs of a preset; that of the times unless ``brief``."""
    rows = [row for (p, _), of in groups.items() if p == preset for row in of.values()]
    if not rows:
        return "not run."
    seeds = _seeds(rows)
    plural = "" if seeds == 1 else "s"
    of_times = "; times are medians of steps, apart from the runs, in turns on one machine"
    tuning_steps = PRESETS[preset].tuning_steps
    if tuning_steps is not None:
        of_times = f"; rates were tuned in {tuning_steps} steps{of_times}"
    return (
        f"{rows[0].steps} steps, {seeds} seed{plural}, mean ± standard deviation of the test loss "
        f"in nats per token{'' if brief else of_times + _CLIPPED}."
    )


def _presets(groups: Groups) -> list[str]:
    return list(dict.fromkeys([*PLANNED, *(preset for preset, _ in groups)]))
