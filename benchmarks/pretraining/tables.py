"""Markdown tables of the results."""

import math
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.pretraining.methods import CHANGES, METHODS
from benchmarks.pretraining.search import Rates
from benchmarks.pretraining.summary import RECIPE, REFERENCE, Group, Row, best, separated
from benchmarks.pretraining.tuning import Tuned

NOT_RUN = "not run"
PLUS_MINUS = "\u00a0±\u00a0"  # Not to be broken into lines.
COURSE = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # of a run


def losses(
    groups: Mapping[Group, Mapping[tuple[str, Rates], Row]], preset: str, methods: Iterable[str]
) -> str:
    """Final test losses of a preset, for ``methods`` and, in an unfinished table, "not run"."""
    corpora = sorted(corpus for p, corpus in groups if p == preset)
    rows = {corpus: list(groups[preset, corpus].values()) for corpus in corpora}
    seeds = max(len(r.seeds) for of_corpus in rows.values() for r in of_corpus)
    header = ["", "rate × ratio", "state, MiB"]
    header += [f"test loss, {c}" for c in corpora]
    header += [f"steps to AdamW's loss, {c}" for c in corpora]
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
                *(_loss(r, seeds) for r in found),
                *(_steps(r) for r in found),
                f"{1e3 * sum(r.step_seconds for r in present) / len(present):.0f}",
            ]
        )
    return table(header, lines)


def course(rows: Iterable[Row], shares: Sequence[float] = COURSE) -> str:
    """Mean validation losses along the run, at shares of its steps."""
    lines = []
    for row in rows:
        if row.curve:
            losses = {point.step: point.loss for point in row.curve}
            nearest = [min(losses, key=lambda s: abs(s - share * row.steps)) for share in shares]
            cells = (f"{losses[step]:.3f}" for step in nearest)
            lines.append([label(row.method), str(row.rates), *cells])
    return table(["after", "rate × ratio", *(f"{100 * s:.0f} %" for s in shares)], lines)


def verdicts(rows: Iterable[Row], recipe: str = RECIPE) -> list[str]:
    """The recipe against each other method of a group, in one line each."""
    rows = list(rows)
    ours = best(rows, recipe)
    if ours is None or ours.diverged:
        return []
    lines = []
    for other in rows:
        if other.method == recipe:
            continue
        if other.diverged:
            lines.append(f"{label(other.method)} diverged")
            continue
        verdict = "the standard deviations overlap"
        if separated(ours, other):
            verdict = "lower by more than the standard deviations"
        elif separated(other, ours):
            verdict = "higher by more than the standard deviations"
        elif None in (ours.test_std, other.test_std):
            verdict = "one seed"
        lines.append(f"{ours.test - other.test:+.3f} against {label(other.method)}: {verdict}")
    return lines


def tuning(tuned: Mapping[str, Tuned]) -> str:
    """The tuned rates and their loss, how many runs found them, and all of these runs."""
    lines = []
    for method in _ordered(tuned):
        found = tuned[method]
        cells = (
            f"{rates}: {'diverged' if loss is None else f'{loss:.3f}'}"
            for rates, loss in sorted(found.curve.items())
        )
        edge = " (at the edge)" if found.at_edge else ""
        lines.append(
            [
                label(method),
                f"**{found.rates}**{edge}",
                f"{found.loss:.3f}",
                str(len(found.curve)),
                "; ".join(cells),
            ]
        )
    return table(["", "best rate × ratio", "loss", "runs", "all runs"], lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(method: str) -> str:
    """What a method is called in a table, with what was changed about it."""
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


def _ordered(methods: Iterable[str]) -> list[str]:
    names = list(METHODS)
    return sorted(methods, key=lambda m: (names.index(m) if m in names else len(names), m))


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
    if row.method == REFERENCE:
        return "100 %"
    if row.to_reference is None:
        return "not known"
    return "not reached" if math.isinf(row.to_reference) else f"{100 * row.to_reference:.0f} %"
