"""Plans as text: read from what a model writes, and written for prompts.

Arguments are Python's and JSON's literals, and references.

A scanner of its own instead of Python's parser: nothing is ever evaluated, nesting has a limit
that does not depend on the interpreter, and `true`, `null` and `from="x"` are accepted.
"""

import json
import re
import unicodedata
from dataclasses import replace

from examples.finetune.planner.plans.plan import (
    JOIN,
    MAX_CALLS,
    MAX_DEPTH,
    MAX_DIGITS,
    REFERENCE,
    Argument,
    Call,
    FailedPlan,
    Plan,
    PlanError,
    Ref,
    Text,
    Value,
    read_string,
    reference_of,
    text_of,
    write_string,
)

END_OF_PLAN = "<END_OF_PLAN>"

MAX_CHARACTERS = 100_000
"""The longest text that is read: many times what a model writes for a plan of `MAX_CALLS`."""

# Numbers of Markdown lists may have marks before them.
_ACTION = r"[ \t>*`-]*+(?:[Ss]tep[ \t]++)?+([0-9]{1,9})[.):][ \t*`]*+([^\W\d]\w*+)[ \t]*+\("
_HERE = re.compile(_ACTION)
_LINE = re.compile("^" + _ACTION, re.MULTILINE)
_END = re.compile(rf"\)|(?={END_OF_PLAN}|{_ACTION}|\Z)")

_BLANK = re.compile(r"\s*+")
_NAME = re.compile(r"([^\W\d]\w*+)\s*+=(?!=)")
_WORD = re.compile(r"[^\W\d]\w*+")
_DIGITS = "[0-9]++(?:_[0-9]++)*+"
_NUMBER = re.compile(
    r"[+-]?+(?:(?P<base>0[xX][0-9a-fA-F]++|0[oO][0-7]++|0[bB][01]++)"
    rf"|(?:{_DIGITS}(?P<fraction>\.(?:{_DIGITS})?+)?+|(?P<point>\.{_DIGITS}))"
    rf"(?P<power>[eE][+-]?+{_DIGITS})?+)"
)
_STRING = re.compile(
    r'(?P<prefix>[rRuU]?+)(?:"""(?P<ddd>[^"\\]*+(?:(?:\\.|"(?!""))[^"\\]*+)*+)"""'
    r"|'''(?P<sss>[^'\\]*+(?:(?:\\.|'(?!''))[^'\\]*+)*+)'''"
    r'|"(?P<d>[^"\\]*+(?:\\.[^"\\]*+)*+)"'
    r"|'(?P<s>[^'\\]*+(?:\\.[^'\\]*+)*+)')",
    re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})(?:(?<=[dD][89abAB]..)\\u([dD][c-fC-F][0-9a-fA-F]{2}))?+"
    r"|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([0-7]{1,3})|N\{([^{}]+)\}|(.))",
    re.DOTALL,
)
_ESCAPED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"} | {
    **{character: character for character in "\"'\\/"},
    "\n": "",
}
_CONSTANTS = {"True": True, "true": True, "False": False, "false": False} | dict.fromkeys(
    ("None", "null")
)


def scan_arguments(text: str, at: int) -> tuple[tuple[Argument, ...], int]:
    """Reads arguments up to the closing parenthesis; returns them and the position after it.

    The parenthesis may be missing before the next action, the end mark and the end of the text.

    Raises:
      PlanError: where something else is written.
    """
    arguments: list[Argument] = []
    at = _skip(text, at)
    while not (end := _END.match(text, at)):
        name = None
        if match := _NAME.match(text, at):
            name, at = match[1], _skip(text, match.end())
        value, at = _value(text, at, 0)
        arguments.append(Argument(value, name))
        at = _comma_or(")", text, at, _END)
    return tuple(arguments), end.end()


def _value(text: str, at: int, depth: int) -> tuple[Value, int]:
    if depth > MAX_DEPTH:
        raise PlanError(f"an argument is nested more than {MAX_DEPTH} deep")
    if at >= len(text):
        raise PlanError("the text ends inside a call")
    if _STRING.match(text, at):
        return _string(text, at)
    match text[at]:
        case '"' | "'":
            raise PlanError(f"quotes are not closed: {_near(text, at)}")
        case "$":
            if reference := REFERENCE.match(text, at):
                return reference_of(reference), reference.end()
        case "[":
            return _items("]", text, at + 1, depth)
        case "(":
            return _items(")", text, at + 1, depth)
        case "{":
            return _entries(text, at + 1, depth)
        case _:
            if match := _NUMBER.match(text, at):
                return _number(match), match.end()
            if (match := _WORD.match(text, at)) and match[0] in _CONSTANTS:
                return _CONSTANTS[match[0]], match.end()
    raise PlanError(f"expected a value, found {_near(text, at)}")


def _items(close: str, text: str, at: int, depth: int) -> tuple[Value, int]:
    items: list[Value] = []
    at = end = _skip(text, at)
    while not text.startswith(close, at):
        item, end = _value(text, at, depth + 1)
        items.append(item)
        at = _comma_or(close, text, end)
    if close == ")" and len(items) == 1 and text.find(",", end, at) < 0:
        return items[0], at + 1  # Python's tuples of one item have a comma.
    return items, at + 1


def _entries(text: str, at: int, depth: int) -> tuple[dict[str, Value], int]:
    entries: dict[str, Value] = {}
    at = _skip(text, at)
    while not text.startswith("}", at):
        match = _STRING.match(text, at)
        if match is None:
            raise PlanError(f"expected a key in quotes, found {_near(text, at)}")
        key, at = _unescape(match), _skip(text, match.end())
        if not text.startswith(":", at):
            raise PlanError(f"expected a colon after a key, found {_near(text, at)}")
        entries[key], at = _value(text, _skip(text, at + 1), depth + 1)
        at = _comma_or("}", text, at)
    return entries, at + 1


def _string(text: str, at: int) -> tuple[Value, int]:
    """Strings one after the other are one string."""
    contents, following = [], at
    while match := _STRING.match(text, following):
        contents.append(_unescape(match))
        at = match.end()
        following = _skip(text, at)
    return read_string("".join(contents)), at


def _unescape(match: re.Match[str]) -> str:
    def character(escape: re.Match[str]) -> str:
        high, low, wide, byte, octal, name, other = escape.groups()
        if other is not None:
            return _ESCAPED.get(other, "\\" + other)
        if low is not None:
            return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00)
        if name is not None:
            try:
                return unicodedata.lookup(name)
            except KeyError:
                raise PlanError(f"there is no character {escape[0]}") from None
        code = int(octal, 8) if octal else int(high or wide or byte, 16)
        if code > 0x10FFFF:
            raise PlanError(f"there is no character {escape[0]}")
        return chr(code)

    prefix, *contents = match.groups()
    content = next(group for group in contents if group is not None)
    if prefix in ("r", "R") or "\\" not in content:
        return content
    return _ESCAPE.sub(character, content)


def _number(match: re.Match[str]) -> int | float:
    if any(match[part] is not None for part in ("fraction", "point", "power")):
        return float(match[0])
    if len(match[0]) > 2 * MAX_DIGITS:  # int() refuses thousands, and a plan more than so many.
        raise PlanError(f"a whole number has more than {MAX_DIGITS} digits")
    return int(match[0], 0 if match["base"] else 10)


def _comma_or(close: str, text: str, at: int, end: re.Pattern[str] | None = None) -> int:
    """The position of the next item, or of the `close` or `end` that comes instead."""
    at = _skip(text, at)
    if text.startswith(",", at):
        return _skip(text, at + 1)
    if not (text.startswith(close, at) or (end and end.match(text, at))):
        raise PlanError(f"expected a comma or {close}, found {_near(text, at)}")
    return at


def _skip(text: str, at: int) -> int:
    return _BLANK.match(text, at).end()  # type: ignore[union-attr]  # It matches everywhere.


def _near(text: str, at: int) -> str:
    return repr(text[at : at + 20]) if at < len(text) else "the end of the text"


def parse_plan(text: str) -> Plan | FailedPlan:
    r"""Reads the actions `1. tool(arguments)` of a text, up to `join()` or the end mark.

    Every action begins a line, or follows another; they are numbered without gaps from 1, or from 0
    (then `$0` is the result of the first). `Step 1: tool(`, `1. tool (` and a missing parenthesis
    at the end of an action are read too. Lines that do not begin as an action (thoughts, fences,
    explanations) and what follows an action in its line are passed over. Arguments are Python's
    literals with or without names, JSON's constants, and references: `$1`, `${1}`, `$1.field`, in
    quotes or not. Within a longer text `$5` is five dollars unless an earlier call is call 5.

    Never raises: a text that holds no plan gives a `FailedPlan` that says why.

    >>> parse_plan('Thought: easy.\n1. find("Ann")\n2. call(number="$1")\n3. join()').tools
    ('find', 'call')
    >>> parse_plan('1. call("$7")\n2. join()')
    FailedPlan(reason='call 1: $7 is out of range, the plan has 2 calls')
    """
    try:
        return Plan(tuple(_calls(text)))
    except PlanError as error:
        return FailedPlan(str(error))


def _calls(text: str) -> list[Call]:
    if len(text) > MAX_CHARACTERS:
        raise PlanError(f"the text has {len(text)} characters, more than {MAX_CHARACTERS}")
    calls: list[Call] = []
    at, first = 0, 1
    while action := _HERE.match(text, at) or _LINE.search(text, at):
        if END_OF_PLAN in text[at : action.start()]:
            break
        number, tool = int(action[1]), action[2]
        if not calls:
            first = min(number, 1)
        if number != first + len(calls):
            raise PlanError(f"expected call {first + len(calls)}, found number {number}")
        if len(calls) == MAX_CALLS:
            raise PlanError(f"the plan has more than {MAX_CALLS} calls")
        try:
            arguments, at = scan_arguments(text, action.end())
        except PlanError as error:
            raise PlanError(f"call {number}: {error}") from None
        calls.append(_from_one(Call(tool, arguments), len(calls) + 1, first))
        if tool == JOIN:
            break
    if not calls:
        raise PlanError("the text has no line that begins as '1. tool('")
    return calls


def _from_one(call: Call, number: int, first: int) -> Call:
    """Call `number` with results counted from 1, and `$n` in texts as text if no earlier call is n.

    As it is written, the plan counts from `first`.
    """

    def result(ref: Ref) -> Ref:
        return replace(ref, call=ref.call + 1 - first)

    def read_part(part: str | Ref) -> str | Ref:
        if isinstance(part, str):
            return part
        counted = result(part)
        return counted if 1 <= counted.call < number else part.written

    def read(value: Value) -> Value:
        match value:
            case Ref():
                return result(value)
            case Text(parts):
                return text_of([read_part(part) for part in parts])
            case list():
                return [read(item) for item in value]
            case dict():
                return {key: read(item) for key, item in value.items()}
        return value

    return Call(call.tool, tuple(Argument(read(a.value), a.name) for a in call.arguments))


def write_plan(plan: Plan) -> str:
    """The text that `parse_plan` reads as `plan`.

    Values are Python's literals in one line. References are strings, `"$1"` or `"$1.field"`, so
    that every parser of such literals can read them too.
    """
    actions = (
        f"{number}. {call.tool}({', '.join(map(_argument, call.arguments))})\n"
        for number, call in enumerate(plan.calls, start=1)
    )
    return "".join(actions) + END_OF_PLAN


def write_value(value: Value) -> str:
    """One value as a literal."""
    match value:
        case str() | Ref() | Text():
            return json.dumps(write_string(value), ensure_ascii=False)
        case list():
            return f"[{', '.join(map(write_value, value))}]"
        case dict():
            entries = (
                f"{json.dumps(key, ensure_ascii=False)}: {write_value(item)}"
                for key, item in value.items()
            )
            return f"{{{', '.join(entries)}}}"
    return repr(value)


def _argument(argument: Argument) -> str:
    name = "" if argument.name is None else f"{argument.name}="
    return name + write_value(argument.value)
