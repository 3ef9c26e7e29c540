"""Plans: numbered calls of tools, whose arguments may be results of other calls.

Calls are counted from 1, as they are written. A plan is checked when it is made, so every `Plan`
can be drawn as an acyclic graph and written down.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

JOIN = "join"
"""The call that ends a plan; its tool is known to every plan."""

MAX_CALLS = 50
"""The longest plan. Comparing plans is a search for an isomorphism of graphs, which has no known
polynomial bound; the longest reference plan of the data sets used here has 12 calls."""

MAX_DEPTH = 16
"""How far lists and dictionaries may be nested in an argument."""

MAX_DIGITS = 40
"""The longest whole number."""

IDENTIFIER = re.compile(r"[^\W\d]\w*")

_PATH = re.compile(r"(?:[.\[][^{}$]*)?")


class PlanError(ValueError):
    """What is wrong with a plan, in one line."""


@dataclass(frozen=True)
class Ref:
    """The result of another call, or a part of it."""

    call: int
    """Number of the call, from 1."""
    path: str = ""
    """Which part: fields by name and items of lists by position, as in ".flights[0].id"."""

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
    """What a model wrote, where it is not a plan."""

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
        _check_value(argument.value, 0)


def _check_value(value: Value, depth: int) -> None:
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
            try:
                value.encode()
            except UnicodeEncodeError:
                raise PlanError("a text holds half a surrogate pair") from None
        case Text():
            for part in value.parts:
                _check_value(part, depth)
        case list():
            for item in value:
                _check_value(item, depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise PlanError(f"the key of a dictionary must be a text, got {_short(key)}")
                _check_value(key, depth)
                _check_value(item, depth + 1)
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
