"""``python -m benchmarks.pretraining --help``."""

import signal
import sys

from benchmarks.pretraining.report import Report, make_report
from benchmarks.pretraining.run_spec import Run
from benchmarks.pretraining.show import Show, show
from benchmarks.pretraining.step_times import Times, file_of, time_steps
from benchmarks.pretraining.sweep import Sweep, run_sweep
from benchmarks.pretraining.train import run as train
from examples.common.cli import exit_code, parse

Command = Run | Sweep | Times | Show | Report


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    # Wrong arguments end the program here, with exit code 2.
    return exit_code(lambda: run(parse(Command, "benchmarks.pretraining", argv)))


def run(command: Command) -> int:
    """Does what a command says."""
    match command:
        case Run():
            done = train(command) is None
            print(f"{command.path} {'was there already' if done else 'written'}")
        case Sweep():
            return run_sweep(command)
        case Times():
            for method, seconds in time_steps(command)["seconds"].items():
                print(f"{method}: {1e3 * seconds:.0f} ms a step")
            print(f"{file_of(command.root)} written")
        case Show():
            print(show(command))
        case Report():
            for path in make_report(command):
                print(f"{path} written")
    return 0


if __name__ == "__main__":
    # A sweep that is told to end takes its runs along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
