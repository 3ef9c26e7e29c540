"""How good a plan is, next to the reference plan of its record.

The success rate of TinyAgent (Erdogan et al. 2024) looks at tools and dependencies, not at
arguments: a plan with every argument wrong succeeds. The aware one looks at arguments as well, so
it is never higher.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

import networkx as nx

from examples.finetune.planner.plans.arguments import accepts, bind, canonical
from examples.finetune.planner.plans.plan import FailedPlan, Plan, Ref, Text, Value, references
from examples.finetune.planner.plans.records import Record, Tool


class Graph(NamedTuple):
    """A directed graph, nodes counted from 0."""

    nodes: Sequence[Hashable]  # Label of each node.
    edges: Mapping[tuple[int, int], Hashable]  # Label of each edge, from one node to another.


def isomorphic(
    one: Graph, other: Graph, compatible: Callable[[int, int], bool] | None = None
) -> bool:
    """Whether the nodes of the graphs can be matched so that labels and edges are the same.

    The search of networkx (VF2) decides, after invariants that are cheap have sorted the nodes:
    without them it can take exponential time to refuse graphs with many alike nodes.

    Args:
      one, other: the graphs.
      compatible: a further condition on a node of `one` and a node of `other`.
    """
    count = len(one.nodes)
    if count != len(other.nodes) or len(one.edges) != len(other.edges):
        return False
    colours = _refine(one, other)
    mine, theirs = colours[:count], colours[count:]
    if Counter(mine) != Counter(theirs):
        return False

    allowed = {
        (i, j)
        for i in range(count)
        for j in range(count)
        if mine[i] == theirs[j] and (compatible is None or compatible(i, j))
    }
    if compatible is not None and not _all_matched(count, allowed):
        return False
    return nx.is_isomorphic(
        _draw(one),
        _draw(other),
        node_match=lambda i, j: (i["index"], j["index"]) in allowed,
        edge_match=lambda i, j: i["label"] == j["label"],
    )


def _refine(one: Graph, other: Graph) -> list[int]:
    """Colours of all nodes, such that an isomorphism maps every node to one of its colour.

    From labels, then repeatedly from the colours of neighbours (Weisfeiler and Leman).
    """
    shift = len(one.nodes)
    edges = [*one.edges.items()]
    edges += [((i + shift, j + shift), label) for (i, j), label in other.edges.items()]
    colours = _numbered([*one.nodes, *other.nodes])
    while True:
        neighbours: list[Counter[Hashable]] = [Counter() for _ in colours]
        for (i, j), label in edges:
            neighbours[i][("to", label, colours[j])] += 1
            neighbours[j][("from", label, colours[i])] += 1
        finer = _numbered(
            [
                (colour, frozenset(around.items()))
                for colour, around in zip(colours, neighbours, strict=True)
            ]
        )
        if len(set(finer)) == len(set(colours)):
            return finer
        colours = finer


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _all_matched(count: int, allowed: set[tuple[int, int]]) -> bool:
    graph: Any = nx.Graph()
    graph.add_nodes_from(range(2 * count))
    graph.add_edges_from((i, count + j) for i, j in allowed)
    matching = nx.bipartite.hopcroft_karp_matching(graph, top_nodes=range(count))
    return len(matching) == 2 * count


def _draw(graph: Graph) -> Any:
    drawn: Any = nx.DiGraph()
    drawn.add_nodes_from((i, {"index": i}) for i in range(len(graph.nodes)))
    drawn.add_edges_from((i, j, {"label": label}) for (i, j), label in graph.edges.items())
    return drawn


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


def verdict(record: Record, predicted: Plan | FailedPlan, scores: Scores) -> str:
    """The first of these that is wrong: form, tools, dependencies, arguments.

    `scores` decide whether something is; what exactly is found by matching the calls of a tool in
    their order, which is not the only way to match them.
    """
    if isinstance(predicted, FailedPlan):
        return f"no plan: {predicted.reason}"
    if scores.aware_success:
        return "right"
    expected = record.plan
    if sorted(expected.tools) != sorted(predicted.tools):
        return "; ".join(_differences("tools", Counter(expected.tools), Counter(predicted.tools)))
    if not predicted.joined:
        return "join is missing"
    if not scores.success:
        found = _differences("dependencies", _edges(expected), _edges(predicted))
        return "; ".join(found) or "dependencies differ between calls of one tool"
    return "; ".join(_arguments(record, predicted)) or "arguments are results of other calls"


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
