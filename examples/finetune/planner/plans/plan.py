"""Plans: numbered calls of tools, whose arguments may be results of other calls.

Calls are counted from 1, as they are written. A plan is checked when it is made, so every `Plan`
can be drawn as an acyclic graph and written down.

In a string, `$2` is the result of call 2, and `$2.name` and `$2[0]` are parts of the result. The
braces of `${2.name}` say where the reference ends, and allow names with blanks. Two dollars are one
dollar without a reference: `"$$2"` is the text "$2". Elsewhere a dollar is a dollar, in an amount
of money too: "$1.50", "$1,500".
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from examples.common.text import has_half_pair

JOIN = "join"
"""The call that ends a plan; its tool is known to every plan."""

MAX_CALLS = 50
"""The longest plan. Comparing plans is a search for an isomorphism of graphs, which has no known
polynomial bound; the longest reference plan of the data sets used here has 12 calls."""

MAX_DEPTH = 16
"""Largest depth of lists and dictionaries in an argument."""

MAX_DIGITS = 40
"""The longest whole number."""

IDENTIFIER = re.compile(r"[^\W\d]\w*")

_PATH = re.compile(r"(?:[.\[][^{}$]*)?")


class PlanError(ValueError):
    """A defect of a plan, in one line."""


@dataclass(frozen=True)
class Ref:
    """The result of another call, or a part of it."""

    call: int
    """Number of the call, from 1."""
    path: str = ""
    """Part of the result: fields by name and items of lists by position, as in ".flights[0].id"."""
    written: str = field(default="", compare=False, repr=False)
    """As it was read: the number may have zeros before it, or be in braces without need."""

    def __post_init__(self) -> None:
        if self.call < 0:
            raise PlanError(f"a call cannot have the number {self.call}")
        if not _PATH.fullmatch(self.path):
            raise PlanError(f"the part of a result must look like .name or [0], got {self.path!r}")


@dataclass(frozen=True)
class Text:
    """A string with results inside it; strings and results alone are `str` and `Ref`."""

    parts: tuple[str | Ref, ...]

    def __post_init__(self) -> None:
        pairs = zip(self.parts, self.parts[1:], strict=False)
        if (
            len(self.parts) < 2
            or "" in self.parts
            or not any(isinstance(part, Ref) for part in self.parts)
            or any(isinstance(one, str) and isinstance(other, str) for one, other in pairs)
        ):
            raise PlanError(f"not the parts of a text with results: {self.parts!r}")


Value = None | bool | int | float | str | Ref | Text | list["Value"] | dict[str, "Value"]


@dataclass(frozen=True)
class Argument:
    value: Value
    name: str | None = None
    """None where the position says which parameter it is."""


@dataclass(frozen=True)
class Call:
    tool: str
    arguments: tuple[Argument, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Calls in the order of their numbers. Where the plan has a `join`, it is the last.

    Raises:
      PlanError: for a plan without calls or with more than `MAX_CALLS`; for names that are not
        identifiers; for values that cannot be written; and for results of a call that does not
        exist, of the call itself, of `join`, or of calls that wait for each other.
    """

    calls: tuple[Call, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.calls) <= MAX_CALLS:
            raise PlanError(f"a plan has 1 to {MAX_CALLS} calls, got {len(self.calls)}")
        for number, call in enumerate(self.calls, start=1):
            try:
                _check_call(call, last=number == len(self.calls))
                _check_references(call, number, self.calls)
            except PlanError as error:
                raise PlanError(f"call {number}: {error}") from None
        try:
            TopologicalSorter(self.dependencies()).prepare()
        except CycleError as error:
            circle = " -> ".join(map(str, error.args[1]))
            raise PlanError(f"calls wait for each other: {circle}") from None

    @property
    def joined(self) -> bool:
        """Whether the plan ends with `join`."""
        return self.calls[-1].tool == JOIN

    @property
    def tools(self) -> tuple[str, ...]:
        """The tool of every call but `join`."""
        return tuple(call.tool for call in self.calls if call.tool != JOIN)

    def dependencies(self) -> dict[int, set[int]]:
        """For every call, the calls whose results it takes."""
        return {
            number: {ref.call for argument in call.arguments for _, ref in references(argument)}
            for number, call in enumerate(self.calls, start=1)
        }


@dataclass(frozen=True)
class FailedPlan:
    """Text of a model that is not a plan."""

    reason: str


def references(value: Argument | Value) -> Iterator[tuple[tuple[str | int, ...], Ref]]:
    """Every result in a value, after the keys and positions that lead to it.

    In a text the position is counted in results.
    """
    match value:
        case Argument():
            yield from references(value.value)
        case Ref():
            yield (), value
        case Text():
            yield from references([part for part in value.parts if isinstance(part, Ref)])
        case list():
            for i, item in enumerate(value):
                for place, ref in references(item):
                    yield (i, *place), ref
        case dict():
            for key, item in value.items():
                for place, ref in references(item):
                    yield (key, *place), ref


def text_of(parts: list[str | Ref]) -> str | Ref | Text:
    """The value made of these parts, one after the other."""
    merged: list[str | Ref] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        elif part != "":
            merged.append(part)
    if not merged:
        return ""
    return merged[0] if len(merged) == 1 else Text(tuple(merged))


def from_json(value: Any, read: Callable[[str], Value], depth: int = 0) -> Value:
    """A value decoded from JSON, with every string read by `read`; keys stay as they are."""
    if depth > MAX_DEPTH:
        raise PlanError(f"nested more than {MAX_DEPTH} deep")
    match value:
        case str():
            return read(value)
        case list():
            return [from_json(item, read, depth + 1) for item in value]
        case dict():
            return {key: from_json(item, read, depth + 1) for key, item in value.items()}
    return value


def _check_call(call: Call, *, last: bool) -> None:
    if not IDENTIFIER.fullmatch(call.tool):
        raise PlanError(f"the name of a tool must be an identifier, got {_short(call.tool)}")
    if call.tool == JOIN and not last:
        raise PlanError("join ends a plan, but more calls follow")
    names = [argument.name for argument in call.arguments]
    named = [name for name in names if name is not None]
    if names != [None] * (len(names) - len(named)) + named:
        raise PlanError("a named argument stands before one without a name")
    if len(set(named)) < len(named):
        raise PlanError("two arguments have the same name")
    for name in named:
        if not IDENTIFIER.fullmatch(name):
            raise PlanError(f"the name of an argument must be an identifier, got {_short(name)}")
    for argument in call.arguments:
        check_value(argument.value)


def check_value(value: Value, depth: int = 0) -> None:
    """Raises a PlanError for what cannot be written as an argument."""
    if depth > MAX_DEPTH:
        raise PlanError(f"an argument is nested more than {MAX_DEPTH} deep")
    match value:
        case None | bool() | Ref():
            pass
        case int():
            if abs(value) >= 10**MAX_DIGITS:
                raise PlanError(f"a whole number has more than {MAX_DIGITS} digits")
        case float():
            if not math.isfinite(value):
                raise PlanError(f"a number must be finite, got {value}")
        case str():
            if has_half_pair(value):
                raise PlanError("a text holds half a surrogate pair")
            if "\0" in value:
                raise PlanError("a text holds NUL")
        case Text():
            for part in value.parts:
                check_value(part, depth)
        case list():
            for item in value:
                check_value(item, depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise PlanError(f"the key of a dictionary must be a text, got {_short(key)}")
                check_value(key, depth)
                check_value(item, depth + 1)
        case _:
            raise PlanError(f"an argument cannot be a {type(value).__name__}")


def _check_references(call: Call, number: int, calls: tuple[Call, ...]) -> None:
    for argument in call.arguments:
        for _, ref in references(argument):
            if not 1 <= ref.call <= len(calls):
                raise PlanError(f"${ref.call} is out of range, the plan has {len(calls)} calls")
            if ref.call == number:
                raise PlanError(f"${ref.call} is the result of the call itself")
            if calls[ref.call - 1].tool == JOIN:
                raise PlanError(f"${ref.call} is join, which has no result")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


_SIMPLE = r"(?:\.[A-Za-z_][A-Za-z0-9_]*|\[[0-9]+\])*+"

AMOUNT = r"\.[0-9]|,[0-9]{3}(?![0-9])"
"""The rest of a number that is an amount of money, after its first digits."""

REFERENCE = re.compile(rf"\$(?:\{{([0-9]++)([.\[][^{{}}$]*+)?\}}|([0-9]++)(?!{AMOUNT})({_SIMPLE}))")

_DOLLARS = re.compile(r"\$++(?=[0-9]|\{[0-9])")
_DOLLARS_OR_END = re.compile(r"\$++(?=[0-9]|\{[0-9]|\Z)")


def reference_of(match: re.Match[str]) -> Ref:
    """The reference that `REFERENCE` found."""
    in_braces, path_in_braces, number, path = match.groups()
    # Some digits are enough to be out of range, and int() refuses thousands.
    return Ref(int((in_braces or number)[:9]), path_in_braces or path or "", match[0])


def read_string(content: str) -> str | Ref | Text:
    """The value that a string stands for.

    >>> read_string("Meet at $2.time for $$5")
    Text(parts=('Meet at ', Ref(call=2, path='.time'), ' for $5'))
    """
    parts: list[str | Ref] = []
    end = 0
    for dollars in _DOLLARS.finditer(content):
        pairs, single = divmod(len(dollars[0]), 2)
        parts.append(content[end : dollars.start()] + "$" * pairs)
        end = dollars.end()
        if single and (match := REFERENCE.match(content, end - 1)):
            parts.append(reference_of(match))
            end = match.end()
        elif single:
            parts.append("$")
    return text_of([*parts, content[end:]])


def write_string(value: str | Ref | Text) -> str:
    """The string that `read_string` reads as `value`.

    >>> write_string(Ref(1, ".id")), write_string(Text(("at ", Ref(1), ", ", Ref(2), ".5")))
    ('$1.id', 'at $1, ${2}.5')
    """
    parts = value.parts if isinstance(value, Text) else (value,)
    written = []
    for part, following in zip(parts, (*parts[1:], ""), strict=True):
        if isinstance(part, Ref):
            written.append(_write_reference(part, following if isinstance(following, str) else ""))
        else:
            # The dollar of a reference joins those before it.
            before = _DOLLARS_OR_END if isinstance(following, Ref) else _DOLLARS
            written.append(before.sub(lambda dollars: 2 * dollars[0], part))
    return "".join(written)


def _write_reference(ref: Ref, following: str) -> str:
    """A reference before a text, in braces if it had some or if the end would be misread."""
    plain = f"${ref.call}{ref.path}"
    match = None if ref.written.startswith("${") else REFERENCE.match(plain + following)
    return plain if match and match.end() == len(plain) else f"${{{ref.call}{ref.path}}}"
