"""Isomorphism of small labelled graphs."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import networkx as nx


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
