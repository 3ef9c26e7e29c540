"""Command lines: options to a configuration, errors to exit codes, signals to a flag.

The training loop reads the flag of Ctrl-C and SIGTERM between steps.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import tyro

from examples.common.errors import USER_ERRORS

T = TypeVar("T")


def parse(kind: type[T], program: str, argv: list[str] | None, default: T | None = None) -> T:
    """The configuration that the command line of a program gives, from `default` on."""
    more: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        kind,
        prog=f"python -m {program}",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
        **more,
    )


def peek(argv: list[str] | None, **defaults: str) -> argparse.Namespace:
    """Options that decide the defaults of all others, such as a preset."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_known_args(argv)[0]


def exit_code(
    program: Callable[[], int], on_error: Callable[[int], None] = lambda code: None
) -> int:
    """Exit code of a program; what the user can correct is printed as one line."""
    try:
        return program()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    on_error(code)
    return code


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
