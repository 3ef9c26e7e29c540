"""Ctrl-C and SIGTERM as a flag that the training loop reads between steps."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class StopFlag:
    """Calling it tells whether a stop was asked for; `signal` says by which signal."""

    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """Of a run that was stopped; SIGTERM where another process got the signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def _set(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        # A second signal acts at once, for whoever cannot wait for the end of the step.
        signal.signal(number, _DEFAULT[signal.Signals(number)])


_DEFAULT = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """While inside, SIGINT and SIGTERM set the flag that this yields."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag._set) for number in _DEFAULT}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
