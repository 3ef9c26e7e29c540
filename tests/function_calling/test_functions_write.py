"""A written plan is read as the same plan."""

import ast
import doctest
import importlib

import pytest
from hypothesis import given, settings, strategies as st

from examples.finetune.planner.plans.parse import END_OF_PLAN, parse_plan, write_plan
from examples.finetune.planner.plans.plan import (
    JOIN,
    Argument,
    Call,
    Plan,
    Ref,
    Text,
    read_string,
    text_of,
    write_string,
)

_CALLS = 4
_paths = st.sampled_from(["", ".id", ".a.b[0]", "[12]", ".Exchange Rate", ".größe", ". ) \"'\\"])
# Dollars, digits and braces are where references could be misread.
_texts = st.text(
    st.sampled_from("$$$123{}.[]a\\\"'\n")
    | st.characters(exclude_categories=["Cs"], exclude_characters="\0")
)


def _refs(others):
    return st.builds(Ref, st.sampled_from(others), _paths)


def _values(others):
    parts = _texts | _refs(others) if others else _texts
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(10**39), 10**39)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.lists(parts, max_size=4).map(text_of)
    )
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
        max_leaves=5,
    )


_names = st.from_regex(r"[^\W\d]\w{0,5}", fullmatch=True).filter(lambda name: name != JOIN)


@st.composite
def _plans(draw):
    calls = []
    for number in range(1, draw(st.integers(1, _CALLS)) + 1):
        values = _values(list(range(1, number)))
        arguments = [Argument(value) for value in draw(st.lists(values, max_size=3))]
        names = draw(st.lists(_names, max_size=2, unique=True))
        arguments += [Argument(draw(values), name) for name in names]
        calls.append(Call(draw(_names), tuple(arguments)))
    return Plan((*calls, Call(JOIN)) if draw(st.booleans()) else tuple(calls))


@settings(max_examples=60, deadline=None)
@given(_plans())
def test_round_trip(plan):
    read = parse_plan(write_plan(plan))
    assert read == plan
    # Equality does not tell 1 from True.
    assert repr(read) == repr(plan)


@settings(max_examples=150, deadline=None)
@given(st.lists(_texts | _refs([1, 23]), max_size=5).map(text_of))
def test_strings_round_trip(value):
    assert read_string(write_string(value)) == value


@settings(max_examples=30, deadline=None)
@given(_values([1, 2]))
def test_values_are_literals_of_python(value):
    plan = Plan((Call("f"), Call("f"), Call("f", (Argument(value),))))
    written = write_plan(plan).split("\n3. ")[1].removesuffix(f"\n{END_OF_PLAN}")
    assert len(written.split("\n")) == 1
    ast.literal_eval(written.removeprefix("f(").removesuffix(")"))


@pytest.mark.parametrize("name", ["parse", "records", "plan"])
def test_examples_in_documentation(name):
    found = doctest.testmod(importlib.import_module(f"examples.finetune.planner.plans.{name}"))
    assert found.attempted and not found.failed


def test_form():
    plan = Plan(
        (
            Call("find", (Argument("Müller\n"),)),
            Call("send", (Argument([Ref(1), Ref(1, ".id")]), Argument({"a": None}, "b"))),
            Call("note", (Argument(Text(("for ", Ref(2), " and $5"))), Argument("$5"))),
            Call(JOIN),
        )
    )
    assert write_plan(plan) == (
        '1. find("Müller\\n")\n'
        '2. send(["$1", "$1.id"], b={"a": None})\n'
        '3. note("for $2 and $$5", "$$5")\n'
        "4. join()\n"
        "<END_OF_PLAN>"
    )
