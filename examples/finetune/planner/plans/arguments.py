"""When arguments are equal.

- An argument without a name has that of the parameter at its position. Order does not matter then.
- An argument equal to the default that its parameter declares counts as left out.
- Numbers are equal by value, 1 and 1.0 too; truth values and strings of digits are no numbers.
- Strings are equal regardless of case, Unicode composition (NFC) and the amount of white space
  between words; white space at the ends does not count. Punctuation does.
- Lists are equal item by item, in order; dictionaries by key, in any order.
- Results of calls are equal if they are the same part of calls that are matched to each other.
- Where a record lists accepted values, any of them is right, at any depth.
"""

import unicodedata
from collections.abc import Hashable, Mapping

from examples.finetune.planner.plans.plan import Call, Ref, Text, Value
from examples.finetune.planner.plans.records import MISSING, Accepted, OneOf, Tool


def bind(call: Call, tool: Tool | None) -> dict[str, Value]:
    """Arguments by the name of their parameter, in the order of the parameters, without defaults.

    Arguments that the tool does not know come last: by position, then by name.
    """
    parameters = tool.parameters if tool else ()
    names = [parameter.name for parameter in parameters]
    bound: dict[str, Value] = {}
    for i, argument in enumerate(call.arguments):
        name = argument.name or (names[i] if i < len(names) else f"#{i}")
        # A name that repeats a position cannot be called; it must not hide the other.
        bound[name if name not in bound else f"{name}#{i}"] = argument.value
    for parameter in parameters:
        default, name = parameter.default, parameter.name
        if default is MISSING or name not in bound:
            continue
        if canonical(bound[name]) == canonical(default):
            del bound[name]
    unknown = sorted(name for name in bound if name not in names)
    return {name: bound[name] for name in [*names, *unknown] if name in bound}


def canonical(value: Value) -> Hashable:
    """Equal for equal values; of references it holds the part, not the call."""
    match value:
        case None | bool():
            return "constant", value
        case int() | float():
            return "number", value
        case str():
            return "text", _folded(value)
        case Ref():
            return "result", value.path
        case Text():
            # The place of a result is marked by a character that no text has: none may hold NUL.
            marked = "".join(part if isinstance(part, str) else "\0" for part in value.parts)
            paths = tuple(part.path for part in value.parts if isinstance(part, Ref))
            return "text with results", _folded(marked), paths
        case list():
            return "list", tuple(map(canonical, value))
        case dict():
            return "dictionary", frozenset((key, canonical(item)) for key, item in value.items())
    raise TypeError(f"not a value: {value!r}")


def accepts(
    accepted: Mapping[str, Accepted], arguments: Mapping[str, Value], tool: Tool | None
) -> bool:
    """Whether these arguments, by name, are among the accepted ones."""
    parameters = tool.parameters if tool else ()
    defaults = {p.name: p.default for p in parameters if p.default is not MISSING}
    return all(name in accepted for name in arguments) and all(
        _accepts(options, arguments[name])
        if name in arguments
        else _may_be_left_out(options) or (name in defaults and _accepts(options, defaults[name]))
        for name, options in accepted.items()
    )


def _accepts(accepted: Accepted, value: Value) -> bool:
    match accepted:
        case OneOf():
            return any(_accepts(option, value) for option in accepted.options)
        case list():
            return (
                isinstance(value, list)
                and len(value) == len(accepted)
                and all(map(_accepts, accepted, value))
            )
        case dict():
            return isinstance(value, dict) and accepts(accepted, value, None)
    return canonical(accepted) == canonical(value)


def _may_be_left_out(accepted: Accepted) -> bool:
    return isinstance(accepted, OneOf) and accepted.optional


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
