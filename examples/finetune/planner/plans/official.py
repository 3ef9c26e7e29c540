r"""Success by the rule of TinyAgent's public evaluator (Erdogan et al. 2024).

The rule compares tools and dependencies, not arguments, and reads texts more leniently and more
strictly than `parse_plan`:

- A call is `1. tool(...)` anywhere in a line, with one blank after the dot and none before the
  parenthesis, and extends to the last parenthesis of its line. Everything else is passed over, a
  thought in the line before a call too. A number that comes again replaces the earlier call;
  `join` ends the plan, an unknown tool cuts it off.
- Arguments that are Python literals are values; all other arguments are one string, as written.
- The first `$k` of a string is the call in position k, whatever its number. Lists are looked into,
  but not lists in lists, tuples or dictionaries. `${1}` is no result; the price "$5" is one.
- Results of no call, of the call itself, and of calls that wait for each other are failures.

Texts of more than `MAX_CHARACTERS` are failures here, of any length there.
"""

import ast
import re
import warnings
from collections.abc import Collection, Hashable, Sequence
from graphlib import TopologicalSorter
from itertools import takewhile

from examples.finetune.planner.plans.graphs import Graph, isomorphic
from examples.finetune.planner.plans.parse import END_OF_PLAN, MAX_CHARACTERS, write_plan
from examples.finetune.planner.plans.plan import JOIN
from examples.finetune.planner.plans.records import Record

_CALL = re.compile(r"(?:Thought: [^\n]*+\n\s*+)?(?<!\d)(\d++)\. (\w++)\((.*)\).*")
_RESULT = re.compile(r"\$(\d++)")

_Call = tuple[str, Sequence[object]]
"""A tool and its arguments."""


def officially_succeeds(record: Record, text: str) -> bool:
    """Compare the tools and the dependencies of a text with those of the record's plan.

    Texts are read up to the end mark, where TinyAgent stops its model. The evaluator has the
    arguments of the reference as values, from its data set. It knows no names of arguments; where
    the reference has them, names are dropped from both sides, so that each argument is a value of
    its own.
    """
    if len(text) > MAX_CHARACTERS:
        return False
    tools = {tool.name for tool in record.tools} | {JOIN}
    named = any(argument.name for call in record.plan.calls for argument in call.arguments)
    if record.labelled is None:
        label = _calls(write_plan(record.plan).removesuffix(END_OF_PLAN), tools, named)
    else:
        names = (call.tool for call in record.plan.calls)
        label = list(zip(names, record.labelled, strict=True))
    shapes: dict[Hashable, int] = {}
    try:
        expected = _graph(label, shapes)
        predicted = _graph(_calls(text.partition(END_OF_PLAN)[0], tools, named), shapes)
    except ValueError:  # A result that cannot be taken, or a number of thousands of digits.
        return False
    return isomorphic(expected, predicted)


def _calls(text: str, tools: Collection[str], named: bool) -> list[_Call]:
    # Calls that are not closed would take quadratic time: a "(" after the last ")" of a line goes.
    parts = (line.rpartition(")") for line in text.split("\n"))
    closed = "\n".join(head + end + tail.replace("(", "[") for head, end, tail in parts)
    calls: dict[int, _Call] = {}
    for number, tool, written in _CALL.findall(closed):
        calls[int(number)] = tool, _arguments(written, named)
        if tool == JOIN:
            break
    return list(takewhile(lambda call: call[0] in tools, calls.values()))


def _arguments(written: str, named: bool) -> Sequence[object]:
    if not written:
        return ()
    try:
        with warnings.catch_warnings(action="ignore"):  # About escapes that Python does not know.
            value = _values(written) if named else ast.literal_eval(written)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError, RecursionError):
        value = written
    return value if isinstance(value, list | tuple) else (value,)


def _values(written: str) -> list[object]:
    """The values of arguments: first those without a name, then by name."""
    call = ast.parse(f"f({written})", mode="eval").body
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise ValueError("more than arguments")
    keywords = sorted(call.keywords, key=lambda keyword: keyword.arg or "")
    nodes = [*call.args, *(keyword.value for keyword in keywords)]
    return [ast.literal_eval(node) for node in nodes]


def _graph(calls: Sequence[_Call], shapes: dict[Hashable, int]) -> Graph:
    """The graph whose isomorphism decides, with an edge from a call to each that takes its result.

    The label of a node is its tool and the labels of what it depends on, repeatedly; sorted by
    tool, and by position where tools are the same. `shapes` numbers such labels: written out, they
    would grow exponentially with the depth of a plan.

    Raises:
      ValueError: if a result cannot be taken.
    """
    taken = {number: _results(arguments) for number, (_, arguments) in enumerate(calls, start=1)}
    if any(not 1 <= call <= len(calls) for results in taken.values() for call in results):
        raise ValueError("the result of no call")
    labels: dict[int, int] = {}
    for number in TopologicalSorter(taken).static_order():
        inputs = sorted(taken[number], key=lambda call: calls[call - 1][0])
        shape = (calls[number - 1][0], tuple(labels[call] for call in inputs))
        labels[number] = shapes.setdefault(shape, len(shapes))
    return Graph(
        [labels[number] for number in sorted(labels)],
        {(call - 1, number - 1): None for number, results in taken.items() for call in results},
    )


def _results(arguments: Sequence[object]) -> list[int]:
    nested = (value if isinstance(value, list) else [value] for value in arguments)
    strings = (item for items in nested for item in items if isinstance(item, str))
    found = map(_RESULT.search, strings)
    return [int(match[1]) for match in found if match]
