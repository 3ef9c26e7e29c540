"""From what a model writes to a plan."""

import re

from examples.finetune.planner.literals import scan_arguments
from examples.finetune.planner.plan import (
    JOIN,
    MAX_CALLS,
    Argument,
    Call,
    FailedPlan,
    Plan,
    PlanError,
    Ref,
    Text,
    Value,
    text_of,
)

END_OF_PLAN = "<END_OF_PLAN>"

MAX_CHARACTERS = 100_000
"""The longest text that is read: many times what a model writes for a plan of `MAX_CALLS`."""

# Numbers of Markdown lists may have marks before them.
_ACTION = r"[ \t>*`-]*+([0-9]{1,9})[.):][ \t*`]*+([^\W\d]\w*+)\("
_HERE = re.compile(_ACTION)
_LINE = re.compile("^" + _ACTION, re.MULTILINE)


def parse_plan(text: str) -> Plan | FailedPlan:
    r"""Reads the actions `1. tool(arguments)` of a text, up to `join()` or the end mark.

    Every action begins a line, or follows another; they are numbered from 1 without gaps. Lines
    that do not begin as an action (thoughts, fences, explanations) and what follows an action in
    its line are passed over. Arguments are Python's literals with or without names, JSON's
    constants, and references: `$1`, `${1}`, `$1.field`, in quotes or not. Within a longer text `$5`
    is five dollars if the plan has fewer calls.

    Never raises: a text that holds no plan gives a `FailedPlan` that says why.

    >>> parse_plan('Thought: easy.\n1. find("Ann")\n2. call(number="$1")\n3. join()').tools
    ('find', 'call')
    >>> parse_plan('1. call("$7")\n2. join()')
    FailedPlan(reason='call 1: $7 is out of range, the plan has 2 calls')
    """
    try:
        calls = _calls(text)
        return Plan(tuple(_with_amounts(call, len(calls)) for call in calls))
    except PlanError as error:
        return FailedPlan(str(error))


def _calls(text: str) -> list[Call]:
    if len(text) > MAX_CHARACTERS:
        raise PlanError(f"the text has {len(text)} characters, more than {MAX_CHARACTERS}")
    calls: list[Call] = []
    at = 0
    while action := _HERE.match(text, at) or _LINE.search(text, at):
        if END_OF_PLAN in text[at : action.start()]:
            break
        number, tool = int(action[1]), action[2]
        if number != len(calls) + 1:
            raise PlanError(f"expected call {len(calls) + 1}, found number {number}")
        if number > MAX_CALLS:
            raise PlanError(f"the plan has more than {MAX_CALLS} calls")
        try:
            arguments, at = scan_arguments(text, action.end())
        except PlanError as error:
            raise PlanError(f"call {number}: {error}") from None
        calls.append(Call(tool, arguments))
        if tool == JOIN:
            break
    if not calls:
        raise PlanError("the text has no line that begins as '1. tool('")
    return calls


def _with_amounts(call: Call, count: int) -> Call:
    """The call with `$n` inside texts as text where the plan has no call n."""

    def read_part(part: str | Ref) -> str | Ref:
        if isinstance(part, str) or part.path or 1 <= part.call <= count:
            return part
        return f"${part.call}"

    def read(value: Value) -> Value:
        match value:
            case Text(parts):
                return text_of([read_part(part) for part in parts])
            case list():
                return [read(item) for item in value]
            case dict():
                return {key: read(item) for key, item in value.items()}
        return value

    return Call(call.tool, tuple(Argument(read(a.value), a.name) for a in call.arguments))
