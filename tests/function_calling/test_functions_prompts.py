"""Prompts, the examples in them, and where the completion begins."""

import pytest

from examples.finetune.planner.plans.parse import parse_plan
from examples.finetune.planner.plans.records import Parameter, Record, Tool
from examples.finetune.planner.prompts import (
    PromptConfig,
    Retriever,
    make_pair,
    offered_tools,
    write_prompt,
)

_TOOLS = (
    Tool(
        "find",
        "Looks up\na contact.",
        (Parameter("name", "str", "Whose."),),
        (Parameter("phone"), Parameter("email")),
    ),
    Tool("send", "Sends.", (Parameter("to", "list"), Parameter("how", choices=("sms", "mail")))),
    Tool("wait", "", (Parameter("time", "int", default=5), Parameter("why", required=False))),
    *(Tool(name, f"Does {name}.") for name in ("pay", "play", "open", "close", "draw")),
)


def _record(key, query, *tools):
    calls = [f"{i}. {tool}()\n" for i, tool in enumerate((*tools, "join"), start=1)]
    return Record(key, query, _TOOLS, parse_plan("".join(calls)))


_TRAIN = (
    _record("0", "Find Ann and pay her back", "find", "pay"),
    _record("1", "Play some jazz music", "play"),
    _record("2", "Open the door and close the window", "open", "close"),
    _record("3", "Pay for the music", "pay"),
    _record("4", "Play some jazz music tonight", "wait", "play"),
)


def test_prompt():
    prompt = write_prompt("Call Ann. ", _TOOLS[:3], _TRAIN[1:2], instructions=("Today is Monday.",))
    assert (
        "Tools:\n"
        "1. find(name: str)\n"
        "   Looks up a contact.\n"
        "   name: Whose.\n"
        "   Result: phone, email\n"
        "2. send(to: list, how)\n"
        "   Sends.\n"
        '   how:  One of "sms", "mail".\n'
        "3. wait(time: int = 5, why = None)\n"
        "4. join()\n"
    ) in prompt
    assert "<END_OF_PLAN>.\n- Today is Monday.\n" in prompt
    assert prompt.endswith(
        "Examples:\n\nQuestion: Play some jazz music\n1. play()\n2. join()\n<END_OF_PLAN>\n###\n\n"
        "Question: Call Ann.\n"
    )
    plain = write_prompt("Call Ann.", _TOOLS[:1], details=False)
    assert "1. find(name: str)\n   Looks up a contact.\n2. join()" in plain
    assert "Examples" not in plain and "Whose" not in plain


def test_a_brief_prompt_shows_a_plan_instead_of_rules():
    prompt = write_prompt("Call Ann.", _TOOLS[:1], brief=True)
    assert prompt.startswith("Tools:\n1. find(name: str)\n") and "Rules" not in prompt
    before, form = prompt.split("Answer with calls of these tools in this form:\n")
    assert "join" not in before
    shown = parse_plan(form.partition("\n\nQuestion")[0])
    assert shown.tools == ("tool",) and shown.joined
    assert write_prompt("Call Ann.", _TOOLS[:1]).endswith("Question: Call Ann.\n")
    assert prompt.endswith("<END_OF_PLAN>\n\nQuestion: Call Ann.\n")


def test_nearest_is_by_words_and_stable():
    retriever = Retriever(_TRAIN)
    assert [r.id for r in retriever.nearest("some jazz", 2)] == ["1", "4"]
    assert [r.id for r in retriever.nearest("some jazz", 1, lambda r: r.id != "1")] == ["4"]
    assert [r.id for r in retriever.nearest("zzz", 9)] == ["0", "1", "2", "3", "4"]
    assert retriever.nearest("some jazz", 0) == []


@pytest.mark.parametrize("record", [*_TRAIN, _record("new", "Pay for jazz music", "pay", "play")])
def test_pair(record):
    pair = make_pair(record, Retriever(_TRAIN), PromptConfig(examples=2, negatives=3))
    assert parse_plan(pair.completion) == record.plan
    assert pair.prompt.endswith(f"Question: {record.query}\n")
    # Two examples, neither the record itself nor one with its tools.
    examples = pair.prompt.split("Examples:")[1].rpartition("Question: ")[0]
    shown = [other for other in _TRAIN if f"Question: {other.query}\n" in examples]
    assert len(shown) == 2 == examples.count("Question: ")
    assert record.combination not in {other.combination for other in shown}
    # Every tool that is used anywhere is on offer, with three at least that the plan does not use.
    offered = {tool.name for tool in _TOOLS if f". {tool.name}(" in pair.prompt.split("Rules:")[0]}
    assert record.combination.union(*(other.combination for other in shown)) <= offered
    assert len(offered - record.combination) >= 3


def test_examples_are_those_of_the_training_split():
    pair = make_pair(_record("9", "Draw a tree", "draw"), Retriever(_TRAIN), PromptConfig(5, 0))
    assert pair.prompt.count("Question: ") == 6
    assert pair.prompt.count("Question: Draw a tree\n") == 1


def test_nearest_example_is_last():
    record = _record("9", "Play some jazz music", "draw")
    prompt = make_pair(record, Retriever(_TRAIN), PromptConfig(examples=2, negatives=0)).prompt
    assert prompt.index("jazz music tonight\n") < prompt.index("jazz music\n1. play")


def test_offered_tools_depend_on_seed_and_id_alone():
    record = _record("9", "Draw a tree", "draw")
    tools = offered_tools(record, (), 3, 0)
    assert tools == offered_tools(record, (), 3, 0)
    assert len(tools) == 4 and "draw" in {tool.name for tool in tools}
    assert tools != offered_tools(record, (), 3, 1)
    other = _record("10", "Draw a tree", "draw")
    assert tools != offered_tools(other, (), 3, 0)
    assert set(offered_tools(record, (), 99, 0)) == set(_TOOLS)
    assert [tool.name for tool in offered_tools(record, (), 0, 0)] == ["draw"]


@pytest.mark.parametrize("name", ["examples", "negatives"])
def test_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
        PromptConfig(**{name: -1})
