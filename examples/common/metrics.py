"""Metrics as JSON lines, one record a line, in step order, each step once; and time in training."""

import contextlib
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from examples.common.config import replace_text, with_null
from examples.common.loggers import Logger

Record = dict[str, Any]


class MetricsLog:
    """Collects records in memory, appends them to a file and sends them to loggers, if given."""

    def __init__(self, path: Path | None = None, *, loggers: Sequence[Logger] = ()):
        """Reads what an earlier run recorded in `path`; `rewind` opens it for more."""
        self._loggers = loggers
        self.records: list[Record] = [] if path is None else read_metrics(path)
        self.failed = False  # Set when the run has diverged.
        self._path = path
        self._file: TextIO | None = None

    def rewind(self, step: int, knows: Callable[[Record], bool] = lambda record: False) -> None:
        """Drops what was recorded of later steps, but of the next step what `knows` holds for.

        A run that was killed may have recorded steps after its last checkpoint, which are run
        again.
        """
        self.records = [
            r for r in self.records if r["step"] <= step or (r["step"] == step + 1 and knows(r))
        ]
        for logger in self._loggers:
            logger.rewind(step)
        if self._path is not None:
            self._close_file()
            replace_text(self._path, "".join(_line(r) for r in self.records))
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> Record:
        self.records.append(record)
        for logger in self._loggers:
            logger.write(record)
        if self._file is not None:
            try:
                self._file.write(_line(record))
                self._file.flush()
            except OSError as error:  # Such as that of a full disk, which does not name the file.
                with contextlib.suppress(OSError):
                    self._close_file()
                self._file = None
                raise OSError(error.errno, error.strerror, str(self._path)) from error
        return record

    def close(self) -> None:
        for logger in self._loggers:
            logger.close(self.failed)
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *more: object) -> None:
        self.failed |= error is not None
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """Records of a metrics file, null as NaN; a last line that was cut off is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace", encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        records.append({k: math.nan if v is None else v for k, v in record.items()})
    return records


def of_kind(records: list[Record], kind: str) -> list[Record]:
    """The records of one kind: "train", "validation" or "test"."""
    return [r for r in records if r["kind"] == kind]


def _line(record: Record) -> str:
    return json.dumps(with_null(record), allow_nan=False) + "\n"


class Clock:
    """Counts the time spent in training steps, without evaluations and checkpoints."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._laps: deque[float] = deque(maxlen=20)

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Ends a step; returns the median of the last ones, which no compilation distorts."""
        now = time.perf_counter()
        self._laps.append(now - self._last)
        self.seconds += now - self._last
        self._last = now
        return statistics.median(self._laps)
