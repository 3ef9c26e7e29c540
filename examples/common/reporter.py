"""Progress on the terminal: a bar, or lines where there is no terminal."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.common.metrics import Record

Describe = Callable[[Record], str]  # One record in a few words.
SILENCE = 15.0  # Seconds after which a line says what is going on.


class Activity(NamedTuple):
    """Work of a program, and when a signal ends it."""

    name: str
    stops: str


TRAINING = Activity("training", "after this batch")
COMPILING = Activity(
    "compiling the training step", "right after the compilation, which cannot be interrupted"
)


READING = Activity("reading model and data", "at once")
STARTING = Activity("making the first state", "when that is done")


def evaluating(split: str, records: int | None = None) -> Activity:
    """An evaluation, which asks for a stop before each batch."""
    number = "" if records is None else f", {records} records"
    return Activity(
        f"evaluating on the {split} split{number}", "at the next batch of the evaluation"
    )


class Reporter:
    """Silent reporter: receives the progress of a program, and keeps its current activity."""

    activity = TRAINING

    def start(self, step: int, steps: int, method: str = "") -> None: ...
    def record(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...

    @contextlib.contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """While inside, `activity` is what the program is doing."""
        before, self.activity = self.activity, activity
        try:
            yield
        finally:
            self.activity = before


class _Speaking(Reporter):
    """Breaks the silence from a thread: the main one may be waiting for a compiler."""

    def __init__(self, console: Console, describe: Describe, silence: float):
        self._console, self._describe, self._silence = console, describe, silence
        self._spoke = self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, step: int, steps: int, method: str = "") -> None:
        self._spoke = time.monotonic()
        self._ended.clear()
        self._thread = threading.Thread(target=self._speak_up, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    @contextlib.contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        self._since = time.monotonic()
        alone = self._thread is None  # Such as an evaluation before the training.
        with super().during(activity):
            if alone:
                _Speaking.start(self, 0, 0)
            try:
                yield
            finally:
                if alone:
                    _Speaking.stop(self)

    def note(self, text: str) -> None:
        self._spoke = time.monotonic()
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _speak_up(self) -> None:
        while not self._ended.wait(self._spoke + self._silence - time.monotonic()):
            if time.monotonic() >= self._spoke + self._silence:
                self._spoke = time.monotonic()
                self._status()

    def _status(self) -> None:
        """Say what is going on."""
        if self.activity != TRAINING:
            self.note(f"{self.activity.name}: {time.monotonic() - self._since:.0f} s so far")


class Lines(_Speaking):
    """A line for each evaluation, and for each quarter of a minute without one, for logs."""

    def __init__(self, console: Console, describe: Describe, silence: float = SILENCE):
        super().__init__(console, describe, silence)
        self._prefix, self._steps, self._step, self._train = "", 0, 0, ""
        self._first: tuple[int, float] | None = None  # Step and time of the first record.

    def start(self, step: int, steps: int, method: str = "") -> None:
        self._prefix, self._steps = f"{method}: " if method else "", steps
        self._step, self._train, self._first = step, "", None
        super().start(step, steps, method)

    def record(self, record: Record) -> None:
        text = self._describe(record)
        if record["kind"] == "train":
            self._train, self._step = text, record["step"]
            if self._first is None:
                self._first = self._step, time.monotonic()
        else:
            self.note(f"{self._where()}  {text}  {record['seconds']:.0f} s{self._left()}")

    @contextlib.contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        if activity == COMPILING:
            self.note(activity.name)
        with super().during(activity):
            yield

    def _status(self) -> None:
        if self.activity == TRAINING:
            self.note(f"{self._where()}{self._left()}")
        super()._status()

    def _where(self) -> str:
        where = f"{self._prefix}step {self._step}/{self._steps}"
        return f"{where}  {self._train}" if self._train else where

    def _left(self) -> str:
        """Time until the last step, at the pace since the first record, evaluations included."""
        if self._first is None or self._step == self._first[0] or self._step == self._steps:
            return ""
        step, since = self._first
        pace = (time.monotonic() - since) / (self._step - step)
        return f"  {duration(pace * (self._steps - self._step))} left"


class Bar(_Speaking):
    """A progress bar with loss, metrics and the time left."""

    def __init__(self, console: Console, describe: Describe, silence: float = SILENCE):
        super().__init__(console, describe, silence)
        self._progress: Progress | None = None

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
        super().start(step, steps, method)

    def record(self, record: Record) -> None:
        assert self._progress is not None
        text, step = self._describe(record), record["step"]
        if record["kind"] == "train":
            self._progress.update(self._task, completed=step, train=text)
        else:
            self._progress.update(self._task, completed=step, evaluation=text)

    def stop(self) -> None:
        super().stop()
        if self._progress is not None:
            self._progress.stop()


def duration(seconds: float) -> str:
    """Seconds as "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def make_reporter(
    console: Console, quiet: bool, describe: Describe, brief: Describe | None = None
) -> Reporter:
    """The reporter of a program; `brief` describes records beside a bar, which has less room."""
    if quiet:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax says how long a save takes.
        return Reporter()
    if console.is_terminal:
        return Bar(console, brief or describe)
    return Lines(console, describe)


def on_stderr() -> Lines:
    """Breaks the silence of a program whose output on stdout is a result."""
    return Lines(Console(stderr=True), str, SILENCE)
