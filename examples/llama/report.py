"""What a run says on the terminal: a progress bar, or a few lines where there is no terminal."""

from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from examples.common.metrics import Record
from examples.llama.memory.peak import peak_rows


class Reporter(Protocol):
    """Is told what happens during training."""

    def start(self, step: int, steps: int) -> None: ...
    def record(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Says nothing."""

    def start(self, step: int, steps: int) -> None: ...
    def record(self, record: Record) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Lines(Silent):
    """One line for each evaluation: for logs."""

    def __init__(self, console: Console):
        self._console = console
        self._steps = 0
        self._train = ""

    def start(self, step: int, steps: int) -> None:
        self._steps = steps

    def record(self, record: Record) -> None:
        if record["kind"] == "train":
            self._train = _describe(record)
        else:
            self.note(f"step {record['step']}/{self._steps}  {self._train}  {_describe(record)}")

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


class Bar(Silent):
    """A progress bar with loss, perplexity, speed and the time left."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[train]}"),
            TextColumn("[bold]{task.fields[evaluation]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def start(self, step: int, steps: int) -> None:
        self._task = self._progress.add_task(
            "", total=steps, completed=step, train="compiling", evaluation=""
        )
        self._progress.start()

    def record(self, record: Record) -> None:
        text, step = _describe(record), record["step"]
        if record["kind"] == "train":
            self._progress.update(self._task, completed=step, train=text)
        else:
            self._progress.update(self._task, evaluation=text)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._progress.stop()


def make_reporter(console: Console, quiet: bool) -> Reporter:
    if quiet:
        return Silent()
    return Bar(console) if console.is_terminal else Lines(console)


def summary_table(summary: Record) -> Table:
    """The summary of a run, for people."""
    table = Table(title=f"{summary['name']}: {summary['optimizer']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def row(name: str, value: str, style: str = "") -> None:
        table.add_row(name, value, style=style)

    row("parameters", f"{summary['parameters']:,}")
    if summary["adapter"] != "none":
        row(f"  trained ({summary['adapter']})", f"{summary['trained_parameters']:,}")
    row("optimizer state", _bytes(summary["optimizer_bytes"]))
    row("  AdamW's would be", _bytes(summary["adamw_bytes"]))
    for label, size in peak_rows(summary["memory"]):
        row(label, _bytes(size))
    row("tokens trained on", f"{summary['tokens']:,}")
    row("time in training", f"{summary['seconds']:.0f} s")
    table.add_section()
    for split in ("validation", "test"):
        row(f"{split} perplexity", f"{summary[split]['model']:.1f}", "bold")
        row("  of the bigram model", f"{summary[split]['bigram']:.1f}")
        row("  of the unigram model", f"{summary[split]['unigram']:.1f}")
    return table


def _describe(record: Record) -> str:
    text = f"ppl {record['perplexity']:.1f}"
    if record["kind"] != "train":
        return f"{record['kind']} {text}"
    return f"loss {record['loss']:.3f}  {text}  {record['tokens_per_second']:,.0f} tokens/s"


def _bytes(number: int) -> str:
    return f"{number / 2**20:.1f} MiB"
