"""In what a plan differs from the reference, in words."""

from collections import Counter
from collections.abc import Iterator

from examples.finetune.planner.arguments import accepts, bind, canonical
from examples.finetune.planner.metrics import Scores
from examples.finetune.planner.plan import FailedPlan, Plan, Value
from examples.finetune.planner.records import Record


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
