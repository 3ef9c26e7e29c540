"""What a run says on the terminal: a progress bar, or a few lines where there is no terminal."""

from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from examples.common.metrics import Record

Describe = Callable[[Record], str]  # One record in a few words.


class Reporter(Protocol):
    """Is told what happens during training."""

    def start(self, method: str, step: int, steps: int) -> None: ...
    def record(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Says nothing."""

    def start(self, method: str, step: int, steps: int) -> None: ...
    def record(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Lines(Silent):
    """One line for each evaluation: for logs."""

    def __init__(self, console: Console, describe: Describe):
        self._console, self._describe = console, describe
        self._method, self._steps, self._train = "", 0, ""

    def start(self, method: str, step: int, steps: int) -> None:
        self._method, self._steps = method, steps

    def record(self, record: Record) -> None:
        if record["kind"] == "train":
            self._train = self._describe(record)
        else:
            where = f"{self._method}: step {record['step']}/{self._steps}"
            self.note(
                f"{where}  {self._train}  {self._describe(record)}  {record['seconds']:.0f} s"
            )

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


class Bar(Silent):
    """A progress bar with loss, metrics and the time left."""

    def __init__(self, console: Console, describe: Describe):
        self._console, self._describe = console, describe

    def start(self, method: str, step: int, steps: int) -> None:
        self._progress = Progress(
            TextColumn(method),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[train]}"),
            TextColumn("[bold]{task.fields[evaluation]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "", total=steps, completed=step, train="compiling", evaluation=""
        )
        self._progress.start()

    def record(self, record: Record) -> None:
        text, step = self._describe(record), record["step"]
        if record["kind"] == "train":
            self._progress.update(self._task, completed=step, train=text)
        else:
            self._progress.update(self._task, completed=step, evaluation=text)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._progress.stop()


def make_reporter(console: Console, quiet: bool) -> Reporter:
    if quiet:
        return Silent()
    return Bar(console, _describe) if console.is_terminal else Lines(console, _describe)


def summary_table(summary: dict[str, Any]) -> Table:
    """The methods side by side, for people. Metrics are in percent."""
    table = Table(title=f"{summary['task']}, {summary['model']}")
    columns = [(split, name) for split, found in _metrics(summary).items() for name in found]
    table.add_column("", no_wrap=True)
    for text in ("rate", "trained M", "state MiB"):
        table.add_column(text, justify="right")
    for split, name in columns:
        table.add_column(f"{split} {name}".replace("_", " "), justify="right")
    table.add_column("min", justify="right")

    def values(metrics: dict[str, dict[str, float]]) -> list[str]:
        return [f"{100 * metrics[split][name]:.1f}" for split, name in columns]

    for run in summary["methods"]:
        table.add_row(
            run["method"],
            f"{run['learning_rate']:g}",
            f"{run['trained_parameters'] / 1e6:.2f}",
            f"{run['optimizer_bytes'] / 2**20:.2f}",
            *values(run["metrics"]),
            f"{run['seconds'] / 60:.1f}",
        )
    if summary["baseline"] is not None:
        table.add_row("tf-idf", "", "", "", *values(summary["baseline"]), "")
    return table


def _metrics(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    return summary["methods"][0]["metrics"]


def _describe(record: Record) -> str:
    if record["kind"] == "train":
        return f"loss {record['loss']:.3f}"
    values = ", ".join(f"{name} {100 * value:.1f}" for name, value in record["metrics"].items())
    return f"{record['kind'].replace('_', ' ')} {values}"
