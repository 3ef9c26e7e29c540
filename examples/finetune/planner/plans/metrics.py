"""How good a plan is, next to the reference plan of its record.

Two scores of success read a text in different ways, so that either can be the higher one: the
official score by the rule of TinyAgent's evaluator, without arguments, and all other scores by
`parse_plan`.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields

from examples.finetune.planner.plans.arguments import accepts, bind, canonical
from examples.finetune.planner.plans.graphs import Graph, isomorphic
from examples.finetune.planner.plans.official import officially_succeeds
from examples.finetune.planner.plans.parse import parse_plan
from examples.finetune.planner.plans.plan import FailedPlan, Plan, Value, references
from examples.finetune.planner.plans.records import Record, Tool

_Bound = list[dict[str, Value]]


@dataclass(frozen=True)
class Scores:
    """Each from 0 to 1. A text that `parse_plan` refuses has 0 everywhere but in `success`."""

    parsed: float
    """Whether the text is a plan."""
    success: float
    """The official score: whether the text has the tools and the dependencies of the reference,
    as TinyAgent's evaluator reads it."""
    aware_success: float
    """Whether the plan has the tools, the dependencies and the arguments of the reference."""
    tool_precision: float
    """Share of the plan's calls (without `join`) whose tool the reference calls, each of the
    reference's calls counted once."""
    tool_recall: float
    """Share of the reference's calls whose tool the plan calls, counted likewise."""


def score(record: Record, text: str) -> Scores:
    """Compare what a model wrote with the plan of a record."""
    success = float(officially_succeeds(record, text))
    predicted = parse_plan(text)
    if isinstance(predicted, FailedPlan):
        return Scores(0.0, success, 0.0, 0.0, 0.0)
    expected = record.plan
    common = (Counter(expected.tools) & Counter(predicted.tools)).total()
    return Scores(
        parsed=1.0,
        success=success,
        aware_success=float(_succeeds_aware(record, predicted)),
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


def _succeeds_aware(record: Record, predicted: Plan) -> bool:
    tools = {tool.name: tool for tool in record.tools}
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


def verdict(record: Record, text: str) -> str:
    """The first of these that is wrong in a text: form, tools, dependencies, arguments.

    Calls of one tool are matched in their order, which is not the only way to match them.
    """
    predicted = parse_plan(text)
    if isinstance(predicted, FailedPlan):
        return f"no plan: {predicted.reason}"
    if _succeeds_aware(record, predicted):
        return "right"
    expected = record.plan
    if sorted(expected.tools) != sorted(predicted.tools):
        return "; ".join(_differences("tools", Counter(expected.tools), Counter(predicted.tools)))
    if not predicted.joined:
        return "join is missing"
    if not isomorphic(_dependency_graph(expected), _dependency_graph(predicted)):
        found = _differences("dependencies", _edges(expected), _edges(predicted))
        return "; ".join(found) or "dependencies differ between calls of one tool"
    return "; ".join(_arguments(record, predicted)) or "arguments are results of other calls"


def _dependency_graph(plan: Plan) -> Graph:
    edges = {(i - 1, j - 1): None for j, taken in plan.dependencies().items() for i in taken}
    return Graph([call.tool for call in plan.calls], edges)


def _differences(what: str, expected: Counter[str], predicted: Counter[str]) -> Iterator[str]:
    for text, counter in (("missing", expected - predicted), ("too many", predicted - expected)):
        if counter:
            yield f"{what} {text}: {', '.join(sorted(counter.elements()))}"


def _edges(plan: Plan) -> Counter[str]:
    return Counter(
        f"{plan.calls[needed - 1].tool} -> {plan.calls[number - 1].tool}"
        for number, all_needed in plan.dependencies().items()
        for needed in all_needed
    )


def _arguments(record: Record, predicted: Plan) -> Iterator[str]:
    tools = {tool.name: tool for tool in record.tools}
    by_tool = sorted(range(len(predicted.calls)), key=lambda i: predicted.calls[i].tool)
    expected = sorted(range(len(record.plan.calls)), key=lambda i: record.plan.calls[i].tool)
    for i, j in zip(expected, by_tool, strict=True):
        call, tool = predicted.calls[j], tools.get(predicted.calls[j].tool)
        mine, theirs = bind(record.plan.calls[i], tool), bind(call, tool)
        if record.accepted is not None and accepts(record.accepted[i], theirs, tool):
            continue
        names = [name for name in {**mine, **theirs} if _shown(mine, name) != _shown(theirs, name)]
        if names:
            yield f"arguments of call {j + 1}, {call.tool}: {', '.join(names)}"


def _shown(arguments: dict[str, Value], name: str) -> object:
    return canonical(arguments[name]) if name in arguments else None
