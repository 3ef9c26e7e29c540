"""Progress on the terminal: a bar, or a few lines where there is no terminal."""

from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.common.metrics import Record

Describe = Callable[[Record], str]  # One record in a few words.


class Reporter(Protocol):
    """Receives what happens during training."""

    def start(self, step: int, steps: int, method: str = "") -> None: ...
    def record(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Prints nothing."""

    def start(self, step: int, steps: int, method: str = "") -> None: ...
    def record(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Lines(Silent):
    """One line for each evaluation, for logs."""

    def __init__(self, console: Console, describe: Describe):
        self._console, self._describe = console, describe
        self._prefix, self._steps, self._train = "", 0, ""

    def start(self, step: int, steps: int, method: str = "") -> None:
        self._prefix, self._steps = f"{method}: " if method else "", steps

    def record(self, record: Record) -> None:
        text = self._describe(record)
        if record["kind"] == "train":
            self._train = text
        else:
            where = f"{self._prefix}step {record['step']}/{self._steps}"
            self.note(f"{where}  {self._train}  {text}  {record['seconds']:.0f} s")

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


class Bar(Silent):
    """A progress bar with loss, metrics and the time left."""

    def __init__(self, console: Console, describe: Describe):
        self._console, self._describe = console, describe

    def start(self, step: int, steps: int, method: str = "") -> None:
        self._progress = Progress(
            TextColumn(method or "step"),
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


def make_reporter(
    console: Console, quiet: bool, describe: Describe, brief: Describe | None = None
) -> Reporter:
    """The reporter of a program; `brief` describes records beside a bar, which has less room."""
    if quiet:
        return Silent()
    if console.is_terminal:
        return Bar(console, brief or describe)
    return Lines(console, describe)
