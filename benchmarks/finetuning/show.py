"""A suite as a table, and what is asked of it."""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.environment import RESULTS, print_targets, target
from benchmarks.common.markdown import mean_and_spread, table
from benchmarks.common.result_files import Json, read_results

# Natural GaLore may be so many points below AdamW.
MARGIN = 0.2
# What tf-idf and logistic regression reach on another split of the movie snippets.
BASELINE = 80.8


@dataclass(frozen=True)
class Show:
    """Print a suite: mean ± standard deviation over the seeds, metrics in percent."""

    suite: str = "main"
    """The suite."""
    task: str = "movie-snippets"
    """The task."""
    root: Path = RESULTS / "glue"
    """Directory of all suites."""


def show(options: Show) -> None:
    groups = read_groups(options)
    print(results_table(groups))
    targets = check(groups)
    if targets:
        print_targets(targets)


def read_groups(options: Show) -> list[list[Json]]:
    """The runs of a suite, those of one method, rank and learning rate together."""
    groups: dict[tuple[str, float], list[Json]] = defaultdict(list)
    for r in read_results(options.root, options.suite):
        if r["task"] == options.task:
            groups[r["label"], r["learning_rate"]].append(r)
    return list(groups.values())


def results_table(groups: list[list[Json]]) -> str:
    """Markdown; one line for each method, rank and learning rate."""
    columns = [(s, name) for s, found in groups[0][0]["metrics"].items() for name in found]
    titles = [f"{split} {name}" for split, name in columns]
    rows = [
        [
            group[0]["label"],
            f"{group[0]['learning_rate']:g}",
            str(len(group)),
            f"{group[0]['trained_parameters']:,}",
            f"{group[0]['optimizer_bytes'] / 2**20:.2f}",
            *(
                mean_and_spread([100 * r["metrics"][split][name] for r in group], 1)
                for split, name in columns
            ),
            f"{statistics.median(r['seconds'] for r in group) / 60:.1f}",
        ]
        for group in groups
    ]
    baseline = groups[0][0]["baseline"]
    if baseline is not None:
        found = (f"{100 * baseline[split][name]:.1f}" for split, name in columns)
        rows.append(["tf-idf, logistic", *[None] * 4, *found, None])
    header = ["", "learning rate", "seeds", "trained", "state, MiB", *titles, "minutes"]
    return table(header, rows)


def check(groups: list[list[Json]]) -> list[Json]:
    """Targets of Natural GaLore, for each rank that all methods were run at.

    Means of the main metric of the last split, which is the test split where there is one.
    """
    found = {(group[0]["method"], group[0]["rank"]): group for group in groups}
    if len(found) < len(groups):  # Several learning rates of one method: nothing to compare.
        return []
    targets = []
    for (method, rank), ours in found.items():
        needed = [("adamw", 0), ("lora", rank)]
        if method != "natural-galore" or any(key not in found for key in needed):
            continue
        adamw, lora = (found[key] for key in needed)
        name, score = f"natural-galore, rank {rank}", _main(ours)
        targets += [
            target(f"{name}: points above adamw", score - _main(adamw), -MARGIN, at_most=False),
            target(f"{name}: points above lora", score - _main(lora), 0.0, at_most=False),
            target(f"{name}: state over lora's", _bytes(ours) / _bytes(lora), 1.0),
        ]
        if ours[0]["task"] == "movie-snippets":
            targets.append(target(f"{name}: percent", score, BASELINE, at_most=False))
    return targets


def _main(group: list[Json]) -> float:
    split = list(group[0]["metrics"])[-1]
    return 100 * statistics.fmean(r["metrics"][split][r["metric"]] for r in group)


def _bytes(group: list[Json]) -> int:
    return group[0]["optimizer_bytes"]
