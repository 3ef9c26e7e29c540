"""Command lines: options to a configuration and to a file of options, errors to exit codes."""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import os
import shlex
import shutil
import sys
import textwrap
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

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
    _join_lines_of_help(kind)
    if brief is not None:
        if {"-h", "--help"} & set(argv):
            print(brief.strip())
            raise SystemExit(0)
        argv = ["--help" if word == "--help-all" else word for word in argv]
    more: dict[str, Any] = {} if default is None else {"default": default}
    # A union of commands has the documentation of all unions.
    more["description"] = _wrapped(inspect.getdoc(kind) or "") if isinstance(kind, type) else ""
    # Without its --help an error of tyro does not point to it.
    more["add_help"] = brief is None or "--help" in argv
    try:
        return _at_home(tyro.cli(kind, prog=f"python -m {program}", args=argv, **more))
    except SystemExit as stop:
        if stop.code and brief is not None:
            print(f"all options: python -m {program} --help-all", file=sys.stderr)
        raise


def _wrapped(text: str) -> str:
    """Paragraphs in lines of a box of tyro, which joins lines that begin with a letter."""
    width = min(80, shutil.get_terminal_size().columns)
    how = {"width": width, "initial_indent": "  ", "subsequent_indent": "  "}
    return "\n\n".join(textwrap.fill(" ".join(p.split()), **how) for p in text.split("\n\n"))


@functools.cache  # A plan parses a configuration for each of its candidates.
def _join_lines_of_help(kind: Any) -> None:
    """Let tyro wrap what stands below the fields of a configuration, and of those inside it.

    From a docstring it takes the line breaks of the source too, from metadata what is there.
    """
    inner: list[Any] = [*typing.get_args(kind)]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        below = dict(itertools.chain(*map(_below_fields, reversed(kind.__mro__[:-1]))))
        for field in dataclasses.fields(kind):
            more = {"help": below[field.name]} if field.name in below else {}
            field.metadata = MappingProxyType({**field.metadata, **more})
        inner += typing.get_type_hints(kind).values()
    for hint in inner:
        _join_lines_of_help(hint)


def _below_fields(kind: type) -> Iterator[tuple[str, str]]:
    """Fields of a class, and the docstrings that stand below them, in one line."""
    (defined,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(defined, ast.ClassDef)
    for pair in itertools.pairwise(defined.body):
        match pair:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, " ".join(text.split())


def parse_known(kind: type[T], program: str, argv: Sequence[str] | None) -> tuple[T, list[str]]:
    """As :func:`parse`, and the arguments that are no options of this configuration."""
    _join_lines_of_help(kind)
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


def expand(
    argv: Sequence[str] | None, shorthands: Mapping[str, Sequence[str]], kind: type | None
) -> list[str]:
    """The command line with shorthands written out, after the options of its --config FILE.

    Args:
      argv: words of the command line; None: those of this process.
      shorthands: words and what they stand for.
      kind: type of the configuration, which has the types of the options; None: of no matter,
        as where only the names of options are read.

    Raises:
      ConfigError: if the file cannot be read, or holds anything else than options.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=path_of, nargs="?", action="append", default=[])
    given, words = parser.parse_known_args(argv)
    if None in given.config:
        raise ConfigError("--config needs a file of options")
    types: dict[str, Any] = {}
    if kind is not None:
        types = {word.removeprefix("--"): bool for word in shorthands}
        types |= {name: hint for name, _, hint in _leaves(kind)}
    words = [word for path in given.config for word in _from_file(path, types)] + words
    return [new for word in words for new in shorthands.get(word, [word])]


def apart(words: Sequence[str]) -> list[str]:
    """Arguments with `--a_name=value` as two words, unless the value looks like an option."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            found.append(word)
        elif value.startswith("-"):
            found.append(f"{name.replace('_', '-')}={value}")
        else:
            found += [name.replace("_", "-"), *([value] if equals else [])]
    return found


def bf16_shorthands(option: str) -> dict[str, tuple[str, str]]:
    """--bf16 for an option of the dtype, and `bf16: false` of a file of options."""
    return {"--bf16": (option, "bfloat16"), "--no-bf16": (option, "float32")}


def _from_file(path: Path, types: Mapping[str, Any]) -> list[str]:
    try:
        # Not loaded: YAML would make 8 of 010, true of on and a date of 2024-01-01.
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if root is None:
        return []
    pairs = root.value if isinstance(root, yaml.MappingNode) else [(root, root)]
    if not all(isinstance(name, yaml.ScalarNode) and _is_value(value) for name, value in pairs):
        raise ConfigError(
            f"{path}: expected a line for each option, such as `model.layers: 4`; {OPTIONS} of a "
            "run has them all"
        )
    words, seen = [], set()
    for name, value in pairs:
        where = _place(path, name.value, name)
        option = name.value.replace("_", "-")
        if option in seen:
            raise ConfigError(f"{where}: this option is there twice")
        if types and option not in types:
            near = difflib.get_close_matches(option, types, n=1)
            raise ConfigError(f"{where}: no such option{''.join(f'; {x} is one' for x in near)}")
        seen.add(option)
        words += _words_of(path, name.value, value, types.get(option, Any))
    return words


def _is_value(node: Any) -> bool:
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return all(isinstance(inner, yaml.ScalarNode) for inner in nodes)


def _place(path: Path, name: str, node: yaml.Node) -> str:
    return f"{path}: line {node.start_mark.line + 1}: {name}"


def _words_of(path: Path, name: str, node: Any, hint: Any) -> list[str]:
    """An option of a file as words of the command line; `hint` is its type."""
    kinds = {hint, *typing.get_args(hint)}

    def text_of(scalar: yaml.ScalarNode, has_none: bool) -> str:
        where, text = _place(path, name, scalar), scalar.value
        if scalar.tag == _NULL:
            if not has_none:
                raise ConfigError(f"{where}: null, expected a value")
            return "None"
        if bool in kinds and text != "None":
            if text.lower() not in _BOOLEANS:
                raise ConfigError(f"{where}: expected true or false, got {text!r}")
            return str(_BOOLEANS[text.lower()])
        if float in kinds and text.lower().lstrip("+-") in (".inf", ".nan"):
            return text.replace(".", "")
        return text

    if isinstance(node, yaml.SequenceNode):
        if hint is not Any and not any(typing.get_origin(kind) is tuple for kind in kinds):
            raise ConfigError(f"{_place(path, name, node)}: a list, expected one value")
        items = [text_of(item, False) for item in node.value]
        return [f"--{name}={items[0]}"] if len(items) == 1 else [f"--{name}", *items]
    text = text_of(node, hint is Any or type(None) in kinds)
    if hint is not bool:
        return [f"--{name}={text}"]
    group, dot, field = name.rpartition(".")
    return [f"--{name}" if text == "True" else f"--{group}{dot}no-{field}"]


_NULL = "tag:yaml.org,2002:null"
_BOOLEANS = yaml.SafeLoader.bool_values


def options_text(config: Any, program: str) -> str:
    """All options of a configuration, by the names of the command line, as YAML."""
    values = {
        name: plain(functools.reduce(getattr, fields, config))
        for name, fields, _ in _leaves(type(config))
        if name not in _ONCE
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"# python -m {program} --config {OPTIONS} --name another\n{text}"


def _leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Names of all options of a configuration, the fields that lead to each, and its type."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = hints[field.name], getattr(hints[field.name], "__metadata__", ())
        hint = typing.get_args(hint)[0] if marks else hint
        renamed = [m.name for m in marks if getattr(m, "name", None) is not None]
        name = prefix + (renamed[0] if renamed else field.name.replace("_", "-"))
        if not dataclasses.is_dataclass(hint):
            yield name, (field.name,), hint
            continue
        inner = _leaves(hint, prefix if _WITHOUT_PREFIX in marks else f"{name}.")
        yield from ((option, (field.name, *fields), type_) for option, fields, type_ in inner)


_, _WITHOUT_PREFIX = typing.get_args(tyro.conf.OmitArgPrefixes[int])


def values_of(words: Sequence[str], name: str) -> tuple[str, ...]:
    """The values that the words of a command line give to an option, in their order."""
    split, found = apart(words), []
    for i, word in enumerate(split):
        key, equals, value = word.partition("=")
        if key == name:
            found += [value] if equals else split[i + 1 : i + 2]
    return tuple(found)


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


def exit_without(error: ModuleNotFoundError, extra: str) -> NoReturn:
    """End a program that was started without an extra of this project."""
    package = str(error.name).partition(".")[0]
    sys.exit(f"error: needs {package}: python -m pip install -e '.[{extra}]'")


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
        code = 128 + 13  # SIGPIPE, which Windows has not.
    except USER_ERRORS as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    on_error(code)
    return code
