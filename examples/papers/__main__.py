"""The papers' experiments by name: `python -m examples.papers`."""

import importlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from examples.common import cli
from examples.common.config import differences, path_of, write_json
from examples.common.errors import ConfigError
from examples.common.interrupt import Answer, answered
from examples.papers.experiments import EXPERIMENTS, Experiment
from examples.pretrained.json_file import read_json

USAGE = """Runs of the GaLore and Natural GaLore papers.

python -m examples.papers                     the names, and what each costs (takes a minute)
python -m examples.papers NAME --print        the command lines of an experiment
python -m examples.papers NAME [OPTION ...]   run it: all of its runs, one after another, with
                                              these options of their program (--help). A run
                                              that was stopped goes on, a finished one is not
                                              repeated, except with --overwrite.
"""

# In the directory of a finished run: its command line.
_DONE = "papers.json"
# Options without which a run is not what the name of its experiment says.
_NAMED_AFTER = ("--preset", "--dataset", "--optimizer", "--methods", "--adapter.kind")
_NAMED_AFTER += ("--rank", "--moment-bits", "--per-layer")


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return cli.exit_code(lambda: run(arguments))


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
    printed = "--print" in options
    options = [option for option in options if option != "--print"]
    _check_options(name, experiment, options)
    if "--config" in cli.apart(options):
        options = _with_file(experiment.program, options)
    runs = {run: _of_task(line, options) for run, line in experiment.runs(name).items()}
    if printed:
        for line in runs.values():
            print(cli.command(experiment.program, *line))
        return 0
    return run_all(experiment.program, runs, overwrite="--overwrite" in options)


def _check_options(name: str, experiment: Experiment, options: Sequence[str]) -> None:
    """Raise a ConfigError for an option that makes runs other ones than their names say."""
    of_runs = {option for words in experiment.variants.values() for option in _names(words)}
    of_experiment = {*_NAMED_AFTER} & {*_names(experiment.arguments)}
    for option in _names(cli.expand(options, {}, None)):
        if option in of_runs:
            who = f"each run of {name} sets it, and is named after it"
        elif option in of_experiment:
            who = f"{name} sets it, and is named after it"
        elif option == "--name":
            who = f"the runs of {name} have their own names; --root is the directory of them"
        else:
            continue
        raise ConfigError(f"{option} cannot be given: {who}")


def _with_file(program: str, options: Sequence[str]) -> list[str]:
    """The options, those of their --config FILE written out: a program would read a file before the
    experiment's own options, which would win."""
    module = importlib.import_module(f"{program}.__main__")
    return cli.expand(options, module.SHORTHANDS, module.RunConfig)


def _names(words: Sequence[str]) -> list[str]:
    """The options of a command line; --no-x is one with --x."""
    options = [word for word in cli.apart(words) if word.startswith("--")]
    return [option.replace("--no-", "--", 1) for option in options]


def _of_task(line: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command line with the options; of the --data DIR of several tasks each has DIR/TASK."""
    task, data = (
        cli.values_of(words, name) for words, name in ((line, "--task"), (options, "--data"))
    )
    if not (task and data):
        return [*line, *options]
    directory = path_of(data[-1]) / task[-1]
    if not directory.is_dir():
        raise ConfigError(f"--data must have a directory for each task: there is no {directory}")
    return [*line, *options, "--data", str(directory)]


def run_all(program: str, runs: Mapping[str, Sequence[str]], overwrite: bool) -> int:
    """Each run in a process of its own, until one fails; then the results."""
    from examples.papers.results import results

    directories = []
    for run_name, line in runs.items():
        directory = path_of(cli.values_of(line, "--root")[-1]) / run_name
        directories.append(directory)
        if (directory / _DONE).exists() and not overwrite:
            _check_same(program, directory, line)
            print(f"{directory}: done before", flush=True)
            continue
        resume = ["--resume"] if directory.exists() and not overwrite else []
        # The name stands last: each run of a sweep has its own.
        command = [*line, *resume, "--name", run_name]
        code = run_program([sys.executable, "-m", program, *command])
        if code:
            return code
        write_json(directory / _DONE, {"options": list(line)})
    Console(width=120).print(results(program, directories))
    return 0


def _check_same(program: str, directory: Path, line: Sequence[str]) -> None:
    """Raise a ConfigError if the run that was made has other options than this line."""
    from examples.llama.run_config import HARMLESS

    parse = importlib.import_module(f"{program}.__main__").parse
    made = read_json(directory / _DONE)["options"]
    changed = differences(asdict(parse(made)), asdict(parse([*line])), harmless=HARMLESS)
    if changed:
        raise ConfigError(
            f"{directory}: done before with other options ({', '.join(changed)}): pass "
            "--overwrite, or another --root"
        )


def run_program(command: list[str]) -> int:
    """The exit code of a process, which gets to save its run when this one is to stop."""
    with subprocess.Popen(command) as process:
        # A terminal sends SIGINT to both.
        answers: dict[int, Answer] = {
            signal.SIGINT: lambda number: None,
            signal.SIGTERM: lambda number: process.terminate(),
        }
        with answered(answers):
            return process.wait()


if __name__ == "__main__":
    sys.exit(main())
