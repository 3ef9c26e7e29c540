"""How good a plan is, next to the reference plan of its record.

The success rate of TinyAgent (Erdogan et al. 2024) looks at tools and dependencies, not at
arguments: a plan with every argument wrong succeeds. The aware one looks at arguments as well, so
it is never higher.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from graphlib import TopologicalSorter

from examples.finetune.planner.arguments import accepts, bind, canonical
from examples.finetune.planner.graphs import Graph, isomorphic
from examples.finetune.planner.plan import FailedPlan, Plan, Ref, Text, Value, references
from examples.finetune.planner.records import Record, Tool

_Bound = list[dict[str, Value]]


@dataclass(frozen=True)
class Scores:
    """Each from 0 to 1. A failed plan has 0 everywhere."""

    parsed: float
    """Whether the text was a plan."""
    success: float
    """TinyAgent's: whether the plan has the tools and the dependencies of the reference."""
    aware_success: float
    """Whether it has the arguments too."""
    tool_precision: float
    """Share of the plan's calls (without `join`) whose tool the reference calls, each of the
    reference's calls counted once."""
    tool_recall: float
    """Share of the reference's calls whose tool the plan calls, counted likewise."""


def score(record: Record, predicted: Plan | FailedPlan) -> Scores:
    """Compares a plan with that of a record."""
    if isinstance(predicted, FailedPlan):
        return Scores(0.0, 0.0, 0.0, 0.0, 0.0)
    tools = {tool.name: tool for tool in record.tools}
    expected = record.plan
    common = (Counter(expected.tools) & Counter(predicted.tools)).total()
    return Scores(
        parsed=1.0,
        success=float(_succeeds(expected, predicted, tools)),
        aware_success=float(_succeeds_aware(record, predicted, tools)),
        tool_precision=_share(common, len(predicted.tools), len(expected.tools)),
        tool_recall=_share(common, len(expected.tools), len(predicted.tools)),
    )


def mean_scores(scores: Iterable[Scores]) -> Scores:
    """The mean of each score.

    Raises:
      ValueError: if there are none.
    """
    rows = [asdict(row) for row in scores]
    if not rows:
        raise ValueError("no scores to take the mean of")
    return Scores(**{f.name: sum(row[f.name] for row in rows) / len(rows) for f in fields(Scores)})


def _share(common: int, total: int, other: int) -> float:
    if total == 0:
        return float(other == 0)
    return common / total


def _succeeds(expected: Plan, predicted: Plan, tools: Mapping[str, Tool]) -> bool:
    shapes: dict[Hashable, int] = {}
    return isomorphic(
        _official_graph(expected, tools, shapes), _official_graph(predicted, tools, shapes)
    )


def _official_graph(plan: Plan, tools: Mapping[str, Tool], shapes: dict[Hashable, int]) -> Graph:
    """The graph whose isomorphism TinyAgent's evaluation asks for.

    An edge leads from a call to each call that takes its result; of every string only the first
    result counts, and lists are looked into but not lists in lists, nor dictionaries. The label of
    a node is its tool and the labels of what it depends on, repeatedly; sorted by tool, and by
    position where tools are the same. `shapes` numbers such labels: written out, they would grow
    exponentially with the depth of a plan.
    """
    taken = {
        number: [ref for value in arguments.values() for ref in _seen(value)]
        for number, arguments in enumerate(_bound(plan, tools), start=1)
    }
    labels: dict[int, int] = {}
    for number in TopologicalSorter(taken).static_order():
        inputs = sorted(taken[number], key=lambda call: plan.calls[call - 1].tool)
        shape = (plan.calls[number - 1].tool, tuple(labels[call] for call in inputs))
        labels[number] = shapes.setdefault(shape, len(shapes))
    return Graph(
        [labels[number] for number in sorted(labels)],
        {(call - 1, number - 1): None for number, calls in taken.items() for call in calls},
    )


def _seen(value: Value) -> list[int]:
    items = value if isinstance(value, list) else [value]
    return [next(references(item))[1].call for item in items if isinstance(item, Ref | Text)]


def _succeeds_aware(record: Record, predicted: Plan, tools: Mapping[str, Tool]) -> bool:
    mine, theirs = _bound(record.plan, tools), _bound(predicted, tools)
    if record.accepted is None:
        return isomorphic(_aware_graph(record.plan, mine), _aware_graph(predicted, theirs))
    accepted = record.accepted

    def compatible(i: int, j: int) -> bool:
        return accepts(accepted[i], theirs[j], tools.get(record.plan.calls[i].tool))

    return isomorphic(
        _aware_graph(record.plan, mine, labelled=False),
        _aware_graph(predicted, theirs, labelled=False),
        compatible,
    )


def _aware_graph(plan: Plan, bound: _Bound, labelled: bool = True) -> Graph:
    """Nodes are tools with their arguments; an edge says where a result is taken."""
    places: dict[tuple[int, int], set[Hashable]] = {}
    for j, arguments in enumerate(bound):
        for place, ref in references(dict(arguments)):
            places.setdefault((ref.call - 1, j), set()).add(place)
    nodes = [
        (call.tool, canonical(dict(arguments)) if labelled else None)
        for call, arguments in zip(plan.calls, bound, strict=True)
    ]
    return Graph(nodes, {edge: frozenset(where) for edge, where in places.items()})


def _bound(plan: Plan, tools: Mapping[str, Tool]) -> _Bound:
    return [bind(call, tools.get(call.tool)) for call in plan.calls]
