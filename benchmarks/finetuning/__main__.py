"""``python -m benchmarks.finetuning --help``."""

import signal
import sys

from benchmarks.finetuning.runs import Run, make
from benchmarks.finetuning.show import Show, show
from benchmarks.finetuning.sweep import Sweep, run_sweep
from examples.common.cli import exit_code, parse

Command = Run | Sweep | Show


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    return exit_code(lambda: run(parse(Command, "benchmarks.finetuning", argv)))


def run(command: Command) -> int:
    """Does what a command says."""
    match command:
        case Run():
            done = make(command) is None
            print(f"{command.path} {'was there already' if done else 'written'}")
        case Sweep():
            return run_sweep(command)
        case Show():
            show(command)
    return 0


if __name__ == "__main__":
    # A sweep that is told to end takes its runs along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
