"""The papers' experiments by name: `python -m examples.papers`."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.common.cli import exit_code
from examples.common.errors import ConfigError
from examples.common.interrupt import answered
from examples.papers.experiments import EXPERIMENTS, Experiment

USAGE = """Runs of the GaLore and Natural GaLore papers.

python -m examples.papers                     the names, and what each costs (takes a minute)
python -m examples.papers NAME --print        the command lines of an experiment
python -m examples.papers NAME [OPTION ...]   run it: all of its runs, one after another, with
                                              these options of their program (--help). A run
                                              that was stopped goes on, a finished one is not
                                              repeated.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: run(arguments))


def run(arguments: Sequence[str]) -> int:
    """List, print or run experiments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        if not arguments:
            from examples.papers.cost import table

            print(table(EXPERIMENTS))
        return 0
    name, *options = arguments
    if name not in EXPERIMENTS:
        known = [known for known in EXPERIMENTS if name.strip("/") in known] or EXPERIMENTS
        raise ConfigError(f"no experiment is called {name!r}; there are {', '.join(known)}")
    experiment = EXPERIMENTS[name]
    if {"-h", "--help", "--help-all"} & set(options):
        line = next(iter(experiment.runs(name).values()))
        return run_program([sys.executable, "-m", experiment.program, *line, *options])
    if "--print" in options:
        options.remove("--print")
        for line in experiment.runs(name).values():
            print(shlex.join(["python", "-m", experiment.program, *line, *options]))
        return 0
    return run_all(name, experiment, options)


def run_all(name: str, experiment: Experiment, options: list[str]) -> int:
    """Each run in a process of its own, until one fails; then the results."""
    from examples.papers.results import results

    directories = []
    for run_name, line in experiment.runs(name).items():
        directory = _root([*line, *options]) / run_name
        directories.append(directory)
        if (directory / "summary.json").exists():
            print(f"{directory}: done before", flush=True)
            continue
        resume = ["--resume"] if directory.exists() else []
        # The name stands last: each run of a sweep has its own.
        command = [*line, *options, *resume, "--name", run_name]
        code = run_program([sys.executable, "-m", experiment.program, *command])
        if code:
            return code
    Console(width=120).print(results(experiment.program, directories))
    return 0


def run_program(command: list[str]) -> int:
    """The exit code of a process, which gets to save its run when this one is to stop."""
    with subprocess.Popen(command) as process:
        # A terminal sends SIGINT to both.
        answers = {
            signal.SIGINT: lambda number: None,
            signal.SIGTERM: lambda number: process.terminate(),
        }
        with answered(answers):
            return process.wait()


def _root(line: Sequence[str]) -> Path:
    """The value of --root; the last one counts."""
    words = [word.partition("=") for word in line]
    pairs = zip(words, [*line[1:], ""], strict=True)
    return Path([after or following for (key, _, after), following in pairs if key == "--root"][-1])


if __name__ == "__main__":
    sys.exit(main())
