"""Several peak learning rates of each method, and the best by the validation rows."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from examples.common.compare import Diverged, ShouldStop, was_stopped
from examples.common.errors import ConfigError
from examples.common.interrupt import GO_ON
from examples.common.metrics import Record
from examples.common.reporter import Reporter
from examples.finetune.encoder.data import Task
from examples.finetune.encoder.loop import train
from examples.finetune.encoder.prepare import Prepared
from examples.finetune.encoder.run_config import RunConfig


class Outcome(NamedTuple):
    """A method at one learning rate."""

    method: str
    rate: float
    summary: Record | None  # None: the loss was not finite.

    @property
    def name(self) -> str:
        """Of the directory of the run."""
        return f"{self.method}-lr{self.rate:g}"


def run_names(config: RunConfig) -> list[str]:
    """Names of the directories of all trainings."""
    rates = config.sweep_learning_rates
    if not rates:
        return list(config.methods)
    return [Outcome(method, rate, None).name for method in config.methods for rate in rates]


def sweep(
    config: RunConfig,
    prepared: Prepared,
    run_dir: Path,
    reporter: Reporter,
    console: Console,
    should_stop: ShouldStop,
    started: Callable[[], None],
) -> list[Outcome] | None:
    """Train every method at every rate; None if told to stop before the end.

    A resumed sweep goes on with the run that was stopped.

    Raises:
      ConfigError: see `loop.train`.
    """
    rates = sorted(config.sweep_learning_rates)
    outcomes: list[Outcome] = []
    for method, rate in ((method, rate) for method in config.methods for rate in rates):
        outcome = Outcome(method, rate, None)
        if should_stop():
            console.print(f"stopped before {outcome.name}; {GO_ON}", soft_wrap=True)
            return None
        reporter.note(outcome.name)
        at_rate = dataclasses.replace(config.method, learning_rate=rate)
        one = dataclasses.replace(config, method=at_rate, sweep_learning_rates=())
        where = {"run_dir": run_dir / outcome.name, "reporter": reporter}
        stops = {"should_stop": should_stop, "started": started}
        try:
            result = train(one, method, prepared, **where, **stops)
        except Diverged as error:
            reporter.note(str(error))
        else:
            if was_stopped(outcome.name, result, console, should_stop):
                return None
            outcome = outcome._replace(summary=result.summary())
        outcomes.append(outcome)
    return outcomes


def best_outcomes(outcomes: Sequence[Outcome], task: Task) -> list[Outcome]:
    """Of each method the outcome with the best main metric of the first validation split; among
    equals, the lowest loss. A method that diverged at all rates is left out.

    Raises:
      ConfigError: if all diverged at all rates.
    """
    split, metric = task.validation[0], task.metrics[0]
    found: dict[str, list[tuple[tuple[float, float], Outcome]]] = {}
    for outcome in outcomes:
        if (summary := outcome.summary) is not None:
            key = summary["metrics"][split][metric], -summary["losses"][split]
            found.setdefault(outcome.method, []).append((key, outcome))
    if not found:
        methods = ", ".join(dict.fromkeys(outcome.method for outcome in outcomes))
        raise ConfigError(f"{methods}: the loss is not finite at any rate of the sweep")
    return [max(scored, key=lambda pair: pair[0])[1] for scored in found.values()]


def sweep_table(outcomes: Sequence[Outcome], best: Sequence[Outcome], task: Task) -> Table:
    """The rates with their validation metrics, in percent."""
    table = Table(title="learning rates, by the validation rows")
    columns = [(split, name) for split in task.validation for name in task.metrics]
    titles = (f"{split} {name}".replace("_", " ") for split, name in columns)
    for text in ("", "rate", *titles, "loss", ""):
        table.add_column(text, justify="right" if text else "left", no_wrap=True)
    names = {outcome.name for outcome in best}
    for outcome in outcomes:
        cells = ["not finite"]
        if (summary := outcome.summary) is not None:
            cells = [f"{100 * summary['metrics'][split][name]:.1f}" for split, name in columns]
            cells.append(f"{summary['losses'][task.validation[0]]:.3f}")
            cells.append("best" if outcome.name in names else "")
        table.add_row(outcome.method, f"{outcome.rate:g}", *cells)
    return table


def sweep_record(outcomes: Sequence[Outcome], best: Sequence[Outcome]) -> list[Record]:
    """The same for summary.json; the summaries are in the directories of the runs."""
    names = {outcome.name for outcome in best}
    return [
        {
            "run": outcome.name,
            "method": outcome.method,
            "learning_rate": outcome.rate,
            "diverged": outcome.summary is None,
            "best": outcome.name in names,
        }
        for outcome in outcomes
    ]
