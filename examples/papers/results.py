"""Results of finished runs of an experiment, side by side."""

import json
import statistics
from pathlib import Path

from rich.table import Table

from examples.common.metrics import of_kind, read_metrics
from examples.finetune.encoder.data import TASKS
from examples.papers.experiments import ENCODER, GLUE, LLAMA


def results(program: str, runs: list[Path]) -> Table:
    """A table of finished runs: directories with a summary.json."""
    if program == ENCODER:
        return glue_table(runs)
    return _pretraining(runs) if program == LLAMA else _planner(runs)


def glue_table(runs: list[Path]) -> Table:
    """The best rate of each task by its validation split, and the average over tasks."""
    methods: dict[str, dict[str, tuple[float, float]]] = {}
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        task = summary["task"]
        split = TASKS[task].validation[0]
        for method in summary["methods"]:
            best = methods.setdefault(method["method"], {})
            found = (method["metrics"][split][_metric(task)], method["learning_rate"])
            best[task] = max(found, best.get(task, found))
    table = Table("method", "task", "metric", "rate", "validation")
    for method, best in methods.items():
        for task, (score, rate) in best.items():
            table.add_row(method, task, _metric(task), f"{rate:g}", f"{100 * score:.2f}")
        missing = [task for task in GLUE if task not in best]
        average = 100 * statistics.mean(score for score, _ in best.values())
        note = f"of {len(best)}; missing: {', '.join(missing)}" if missing else f"of {len(best)}"
        table.add_row(method, "average", note, "", f"{average:.2f}", style="bold")
    return table


def _metric(task: str) -> str:
    # The papers report the accuracy of QQP; the program compares F1.
    return "accuracy" if task == "qqp" else TASKS[task].metrics[0]


def _pretraining(runs: list[Path]) -> Table:
    table = Table("run", "rate", "validation perplexity", "GB", "tokens per second")
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        records = of_kind(read_metrics(run / "metrics.jsonl"), "train")
        speed = statistics.median(record["tokens_per_second"] for record in records)
        memory = summary["memory"]
        peak = memory["peak"].get("device") or (memory["predicted"] or {}).get("total", 0)
        table.add_row(
            run.name,
            f"{summary['learning_rate']:g}",
            f"{summary['validation']['model']:.2f}",
            f"{peak / 1e9:.2f}",
            f"{speed:,.0f}",
        )
    return table


def _planner(runs: list[Path]) -> Table:
    table = Table("run", "rate", "best epoch", "test success")
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        for method in summary["methods"]:
            success = method["test"]["metrics"]["success"]
            rate = f"{method['learning_rate']:g}"
            table.add_row(run.name, rate, f"{method['best_epoch']:g}", f"{100 * success:.1f}")
    return table
