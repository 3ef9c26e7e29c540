"""Ctrl-C and SIGTERM: a program ends at once, or in its training loop saves and stops.

Python runs its handlers between two instructions of the main thread, which may be in a compilation
or a tokenizer for minutes. An exception from a handler fares no better: extension modules turn it
into another one or crash, and callbacks of the garbage collector swallow it. So a thread reads the
signals, and prints or exits whatever the main thread does.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

Answer = Callable[[int], object]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ends the line about a run that was stopped and saved.
GO_ON = "--resume goes on from there (make: ARGS=--resume)"

_ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_ending = threading.Lock()  # Held for good by the thread that ends the program.


class StopFlag:
    """Calling it tells whether a stop was asked for; `signal` says by which signal."""

    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """Of a run that was stopped; SIGTERM where another process got the signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def _set(self, number: int) -> None:
        self.signal = number


def end_on_signals() -> None:
    """From here on, SIGINT and SIGTERM end the program at once, with a word."""
    _answer(dict.fromkeys(SIGNALS, _end), _end)


@contextlib.contextmanager
def stop_on_signals(when: Callable[[], str]) -> Iterator[StopFlag]:
    """While inside, SIGINT and SIGTERM set the flag that this yields; a second one exits at once.

    Args:
      when: called from a thread at the first signal; says when the program will have stopped, as
        in "saves and stops ...".
    """
    flag, seen = StopFlag(), threading.Event()

    def stop(number: int) -> None:
        if seen.is_set():
            # An unfinished checkpoint is never seen as one.
            _end(number, "stopped at once; --resume goes on from the last checkpoint")
        seen.set()
        flag._set(number)
        name = signal.Signals(number).name
        _say(f"{name}: saves and stops {when()}; a second signal stops at once, without saving")

    # The handler sets the flag too: whoever signals itself sees it at the next instruction.
    with answered(dict.fromkeys(SIGNALS, stop), flag._set):
        yield flag


@contextlib.contextmanager
def answered(
    answers: Mapping[int, Answer], handler: Answer = lambda number: None
) -> Iterator[None]:
    """While inside, each of these signals is answered at once, from a thread.

    Args:
      answers: are called with the number of their signal.
      handler: called with it in the main thread, at its next instruction.
    """
    before = {number: signal.getsignal(number) for number in answers}
    end = _answer(answers, handler)
    try:
        yield
    finally:
        end()
        for number, was in before.items():
            signal.signal(number, was)


def _answer(
    answers: Mapping[int, Answer], handler: Answer = lambda number: None
) -> Callable[[], None]:
    """Answer signals from a new thread; calling what this returns ends it."""

    def handle(number: int, _frame: FrameType | None) -> None:
        handler(number)

    def answer() -> None:
        with sender, receiver:
            while raw := receiver.recv(1):
                if raw[0] in answers:  # Those of signals with other handlers arrive too.
                    answers[raw[0]](raw[0])

    for number in answers:
        signal.signal(number, handle)
    receiver, sender = socket.socketpair()
    sender.setblocking(False)  # As set_wakeup_fd requires.
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=answer, daemon=True)
    thread.start()

    def end() -> None:
        signal.set_wakeup_fd(wakeup)
        sender.shutdown(socket.SHUT_WR)
        thread.join()

    return end


def _end(number: int, message: str | None = None) -> None:
    """End with what has been printed, without waiting for the main thread."""
    if not _ending.acquire(blocking=False):
        return
    # Nor for longer than this: it may hold the buffer, and who reads from it sleep.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(timeout=1.0)
    _say(message or _ENDINGS[signal.Signals(number)])
    os._exit(128 + number)


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        if sys.stdout.isatty():
            print("\x1b[?25h", flush=True)  # A progress bar has hidden the cursor.


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # Nobody may be listening any more.
        os.write(2, f"{line}\n".encode())
