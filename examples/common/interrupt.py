"""Ctrl-C and SIGTERM: a flag for training loops, a line at once, and an end at the second signal.

Python runs its handlers between two instructions of the main thread, which may be in a compilation
for minutes. So a thread reads the signals, and prints or exits whatever the main thread does.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ends the line about a run that was stopped and saved.
GO_ON = "--resume goes on from there (make: ARGS=--resume)"


class StopFlag:
    """Calling it tells whether a stop was asked for; `signal` says by which signal."""

    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """Of a run that was stopped; SIGTERM where another process got the signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def _set(self, number: int, _frame: FrameType | None = None) -> None:
        self.signal = number


@contextlib.contextmanager
def stop_on_signals(when: Callable[[], str]) -> Iterator[StopFlag]:
    """While inside, SIGINT and SIGTERM set the flag that this yields; a second one exits at once.

    Args:
      when: called from a thread at the first signal; says when the program will have stopped, as
        in "saves and stops ...".
    """
    flag = StopFlag()
    # The handler sets the flag too: whoever signals itself sees it at the next instruction.
    before = {number: signal.signal(number, flag._set) for number in SIGNALS}
    receiver, sender = socket.socketpair()
    sender.setblocking(False)  # As set_wakeup_fd requires.
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(receiver, flag, when), daemon=True)
    watcher.start()
    try:
        yield flag
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        sender.close()
        watcher.join()
        receiver.close()


def _watch(receiver: socket.socket, flag: StopFlag, when: Callable[[], str]) -> None:
    seen = False
    while raw := receiver.recv(1):
        number = raw[0]  # Those of signals with other handlers arrive too.
        if number not in SIGNALS:
            continue
        if seen:
            _exit_now(number)
        seen = True
        flag._set(number)
        name = signal.Signals(number).name
        print(
            f"{name}: saves and stops {when()}; a second signal stops at once, without saving",
            file=sys.stderr,
            flush=True,
        )


def _exit_now(number: int) -> None:
    """End without waiting for the main thread; an unfinished checkpoint is never seen as one."""
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h\n")  # A progress bar has hidden the cursor.
    os.write(2, b"stopped at once; --resume goes on from the last checkpoint\n")
    os._exit(128 + number)
