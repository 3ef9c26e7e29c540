"""Command lines: options to a configuration and to a file of options, errors to exit codes."""

import argparse
import dataclasses
import io
import os
import shlex
import shutil
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from rich.console import Console

from examples.common.config import path_of, plain
from examples.common.errors import USER_ERRORS, ConfigError
from examples.common.text import has_half_pair

T = TypeVar("T")
OPTIONS = "config.yaml"
"""File of a run with all of its options, for --config."""

# Those of one start of a run, which a repetition does not have.
_ONCE = ("resume", "overwrite")


def parse(
    kind: type[T],
    program: str,
    argv: Sequence[str] | None,
    default: T | None = None,
    *,
    brief: str | None = None,
) -> T:
    """The configuration that the command line of a program gives, from `default` on.

    With a `brief` help, --help prints that, and --help-all lists all options.

    Raises:
      ConfigError: for an argument that is not text.
    """
    argv = _words(argv)
    if brief is not None:
        if {"-h", "--help"} & set(argv):
            print(brief.strip())
            raise SystemExit(0)
        argv = ["--help" if word == "--help-all" else word for word in argv]
    more: dict[str, Any] = {} if default is None else {"default": default}
    return _at_home(tyro.cli(kind, prog=f"python -m {program}", args=argv, **more))


def parse_known(kind: type[T], program: str, argv: Sequence[str] | None) -> tuple[T, list[str]]:
    """As :func:`parse`, and the arguments that are no options of this configuration."""
    found, others = tyro.cli(
        kind, prog=f"python -m {program}", args=_words(argv), return_unknown_args=True
    )
    return _at_home(found), others


def _words(argv: Sequence[str] | None) -> list[str]:
    words = list(sys.argv[1:] if argv is None else argv)
    for word in words:
        # Half a pair is what Python makes of bytes that are no text; a --config can hold a NUL.
        if has_half_pair(word) or "\0" in word:
            raise ConfigError(f"{word!r}: arguments must be text in the encoding of the terminal")
    return words


def _at_home(value: Any) -> Any:
    """A configuration with ~ in its paths expanded: a shell leaves that of --to=~/x alone."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return path_of(str(value)) if isinstance(value, Path) else value
    found = {f.name: _at_home(getattr(value, f.name)) for f in dataclasses.fields(value)}
    changed = {k: v for k, v in found.items() if v is not getattr(value, k)}
    return dataclasses.replace(value, **changed) if changed else value


def expand(argv: Sequence[str] | None, shorthands: Mapping[str, Sequence[str]]) -> list[str]:
    """The command line with shorthands written out, after the options of its --config FILE.

    Raises:
      ConfigError: if the file cannot be read, or holds anything else than options.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=path_of, nargs="?", action="append", default=[])
    given, words = parser.parse_known_args(argv)
    if None in given.config:
        raise ConfigError("--config needs a file of options")
    words = [word for path in given.config for word in _from_file(path)] + words
    return [new for word in words for new in shorthands.get(word, [word])]


def apart(words: Sequence[str]) -> list[str]:
    """Arguments with `--a_name=value` as two words, `--a-name` and `value`."""
    found = []
    for word in words:
        if word.startswith("--"):
            name, *value = word.split("=", 1)
            found += [name.replace("_", "-"), *value]
        else:
            found.append(word)
    return found


def bf16_shorthands(option: str) -> dict[str, tuple[str, str]]:
    """--bf16 for an option of the dtype, and `bf16: false` of a file of options."""
    return {"--bf16": (option, "bfloat16"), "--no-bf16": (option, "float32")}


def _from_file(path: Path) -> list[str]:
    try:
        found = yaml.safe_load(path.read_text())
    # ValueError of text that is not UTF-8, and of a date such as 2024-13-01.
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict) or any(isinstance(v, dict) for v in found.values()):
        raise ConfigError(
            f"{path}: expected a line for each option, such as `model.layers: 4`; {OPTIONS} of a "
            "run has them all"
        )
    return [word for name, value in found.items() for word in _option(str(name), value)]


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        group, dot, field = name.rpartition(".")
        return [f"--{name}" if value else f"--{group}{dot}no-{field}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def options_text(config: Any, program: str) -> str:
    """All options of a configuration, by the names of the command line, as YAML."""
    values = {k: v for k, v in _options(config, "").items() if k not in _ONCE}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"# python -m {program} --config {OPTIONS} --name another\n{text}"


def _options(config: Any, prefix: str) -> dict[str, Any]:
    hints = typing.get_type_hints(type(config), include_extras=True)
    found = {}
    for field in dataclasses.fields(config):
        value, marks = getattr(config, field.name), getattr(hints[field.name], "__metadata__", ())
        renamed = [m.name for m in marks if getattr(m, "name", None) is not None]
        name = prefix + (renamed[0] if renamed else field.name.replace("_", "-"))
        if dataclasses.is_dataclass(value):
            found |= _options(value, prefix if _WITHOUT_PREFIX in marks else f"{name}.")
        elif isinstance(value, bool) and type(None) in typing.get_args(hints[field.name]):
            found[name] = str(value)  # tyro makes no flag of `bool | None`: --NAME=True.
        else:
            found[name] = plain(value)
    return found


_, _WITHOUT_PREFIX = typing.get_args(tyro.conf.OmitArgPrefixes[int])


def peek(argv: Sequence[str] | None, **defaults: str) -> argparse.Namespace:
    """Options that decide the defaults of all others, such as a preset.

    One without a value is left to tyro, which explains what is missing.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", nargs="?", default=default, const=default)
    return parser.parse_known_args(argv)[0]


def command(program: str, *arguments: str) -> str:
    """The command line of a program, which runs in this directory as it is printed."""
    return shlex.join((_python(), "-m", program, *arguments))


def _python() -> str:
    """The interpreter of this program, as briefly as the shell finds it."""
    found = shutil.which("python")
    if found is not None and Path(found).absolute() == Path(sys.executable).absolute():
        return "python"
    here = Path.cwd()
    path = Path(sys.executable)
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def terminal() -> Console:
    """Console of a program: names of files and texts of models are no markup."""
    return Console(markup=False)


def _message(error: Exception) -> str:
    """Text of an error; of one of the operating system the file comes first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


_WITH_PLACE = warnings.formatwarning


def _format_warning(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
    """One line for those about a user's files; others say where in the code they come from."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _WITH_PLACE(message, category, *place, **more)


def exit_code(
    program: Callable[[], int], on_error: Callable[[int], None] = lambda code: None
) -> int:
    """Exit code of a program; what the user can correct is printed as one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # A terminal may not have all characters.
        sys.stdout.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.formatwarning = _format_warning
            return program()
    except BrokenPipeError:  # The reader of stdout has enough, such as head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except USER_ERRORS as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    on_error(code)
    return code
