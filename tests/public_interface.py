"""The public interface as text: ``python tests/public_interface.py`` writes it anew."""

import inspect
import pathlib
import types

import natgalore_jax as ng

FILE = pathlib.Path(__file__).parent / "fixtures" / "public_interface.txt"


def describe() -> str:
    """A line for each public name: arguments and their defaults, fields, methods, properties."""
    lines = []
    for prefix, module in {"": ng, "training.": ng.training, "contrib.": ng.contrib}.items():
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or isinstance(value, types.ModuleType):
                continue
            kind = "class " if inspect.isclass(value) else ""
            lines.append(f"{kind}{prefix}{name}({_arguments(value)})")
            if kind:
                lines += [f"  {line}" for line in _members(value)]
    return "\n".join(lines) + "\n"


def _arguments(value) -> str:
    """Without annotations, which read differently in different versions of Python."""
    parameters = inspect.signature(value).parameters.values()
    texts = [
        {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        + p.name
        + ("" if p.default is p.empty else f"={_default(p.default)}")
        for p in parameters
    ]
    # What follows is given by name only.
    keyword_only = [i for i, p in enumerate(parameters) if p.kind == p.KEYWORD_ONLY]
    if keyword_only and not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        texts.insert(keyword_only[0], "*")
    return ", ".join(texts)


def _default(value) -> str:
    return value.__name__ if callable(value) else repr(value)


def _members(cls) -> list[str]:
    """Of the class itself and its bases in the library; the fields are its arguments."""
    members = {}
    for base in cls.__mro__:
        if base.__module__.startswith("natgalore_jax"):
            members = {**vars(base), **members}
    lines = []
    for name, value in sorted(members.items()):
        if name.startswith("_"):
            continue
        if inspect.isfunction(value):
            lines.append(f"{name}({_arguments(value)})")
        elif isinstance(value, (property, classmethod, staticmethod)):
            lines.append(name)
    return lines


if __name__ == "__main__":
    FILE.write_text(describe())
