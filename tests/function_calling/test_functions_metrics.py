"""Success by TinyAgent's rule and with arguments, against a search through all matchings."""

import dataclasses
import itertools
import random

import pytest

from examples.finetune.planner.plans.graphs import Graph, isomorphic
from examples.finetune.planner.plans.metrics import Scores, mean_scores, score
from examples.finetune.planner.plans.parse import parse_plan, write_plan
from examples.finetune.planner.plans.plan import JOIN, Argument, Call, Plan, PlanError, Ref
from examples.finetune.planner.plans.records import OneOf, Parameter, Record, Tool

_TOOLS = (
    Tool("find", "", (Parameter("name"),)),
    Tool("send", "", (Parameter("to"), Parameter("text"), Parameter("now", default=False))),
    Tool("note", "", (Parameter("text"),)),
    *(Tool(name) for name in "abc"),
)
_REFERENCE = (
    '1. find("Ann")\n2. find("Bob")\n3. send(["$1", "$2"], "Lunch at 12")\n'
    '4. note("$3.id")\n5. join()'
)


def _record(text, accepted=None):
    plan = parse_plan(text)
    assert isinstance(plan, Plan)
    return Record("x", "query", _TOOLS, plan, accepted)


def _score(reference, predicted):
    scores = score(_record(reference), predicted)
    return scores.success, scores.aware_success


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (_REFERENCE, (1, 1)),
        # Arguments.
        (_REFERENCE.replace("Ann", "Eve"), (1, 0)),
        (
            '1. find(0)\n2. find()\n3. send(["$1", "$2"], [], {})\n4. note("$3", x=1)\n5. join()',
            (1, 0),
        ),
        (_REFERENCE.replace("$3.id", "$3.name"), (1, 0)),
        (_REFERENCE.replace("$3.id", "$3"), (1, 0)),
        (_REFERENCE.replace('"$1", "$2"', '"$2", "$1"'), (1, 0)),
        # Dependencies.
        (_REFERENCE.replace('"$1", "$2"', '"$1", "Bob"'), (0, 0)),
        (_REFERENCE.replace('"$1", "$2"', '"$1", "$1"'), (0, 0)),
        (_REFERENCE.replace("$3.id", "$1.id"), (0, 0)),
        (_REFERENCE.replace("Lunch at 12", "Lunch at $1"), (0, 0)),
        # Order.
        (
            '1. find("Bob")\n2. find("Ann")\n3. send(["$2", "$1"], "Lunch at 12")\n'
            '4. note("$3.id")\n5. join()',
            (1, 1),
        ),
        (
            '1. note("$3.id")\n2. find("Ann")\n3. send(["$2", "$4"], "Lunch at 12")\n'
            '4. find("Bob")\n5. join()',
            (1, 1),
        ),
        # Tools.
        (_REFERENCE.replace("note", "fly"), (0, 0)),
        (_REFERENCE.replace("note(", "find("), (0, 0)),
        (_REFERENCE.replace("\n5. join()", ""), (0, 0)),
        (_REFERENCE.replace("5. join()", '5. find("Eve")\n6. join()'), (0, 0)),
        # Not plans.
        (_REFERENCE.replace("$3.id", "$7.id"), (0, 0)),
        (_REFERENCE.replace('find("Ann")', 'find("$3")'), (0, 0)),
        (_REFERENCE.replace('find("Ann")', 'find("$1")'), (0, 0)),
        ("", (0, 0)),
        # Equal arguments.
        (_REFERENCE.replace("Lunch at 12", "  lunch  AT 12\\n"), (1, 1)),
        (_REFERENCE.replace('12")', '12", False)'), (1, 1)),
        # With names, and without quotes, arguments are one string for the official score.
        (_REFERENCE.replace('12")', '12", now=True)'), (0, 0)),
        (_REFERENCE.replace('"Lunch at 12"', 'text="Lunch at 12"'), (0, 1)),
        (
            _REFERENCE.replace(
                '["$1", "$2"], "Lunch at 12"', 'text="Lunch at 12", to=["$1", "$2"]'
            ),
            (0, 1),
        ),
        (_REFERENCE.replace("Lunch at 12", "Lunch at 12."), (1, 0)),
        (_REFERENCE.replace('"$1", "$2"', "$1, ${2}"), (0, 1)),
    ],
)
def test_success(predicted, expected):
    assert _score(_REFERENCE, predicted) == expected


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("1", "1.0", True),
        ("1", "True", False),
        ("0", "False", False),
        ("5", '"5"', False),
        ("None", '""', False),
        ('"é"', '"e\\u0301"', True),
        ('"Straße"', '"STRASSE"', True),
        ("[1, 2]", "(1.0, 2)", True),
        ("[1, 2]", "[2, 1]", False),
        ("{'a': 1, 'b': [2]}", "{'b': [2], 'a': 1}", True),
        ("{'a': 1}", "{'a': 1, 'b': None}", False),
        ("{'a': 1}", "{'A': 1}", False),
        ('"$$1"', '"$1"', False),
        ('"at $1"', '" At ${1} "', True),
        ('"at $1"', '"at $1.x"', False),
    ],
)
def test_equal_values(one, other, equal):
    plans = (f"1. a()\n2. b({value})\n3. join()" for value in (one, other))
    assert _score(*plans)[1] == equal


def test_precision_and_recall_count_calls():
    reference = _record(_REFERENCE)
    two_of_three = score(reference, '1. find("")\n2. fly()\n3. note("")')
    assert (two_of_three.tool_precision, two_of_three.tool_recall) == (2 / 3, 2 / 4)
    thrice = score(reference, "1. find()\n2. find()\n3. find()\n4. join()")
    assert (thrice.tool_precision, thrice.tool_recall) == (2 / 3, 2 / 4)
    nothing = score(reference, "1. join()")
    assert (nothing.parsed, nothing.tool_precision, nothing.tool_recall) == (1, 0, 0)
    same = score(_record("1. join()"), "1. join()")
    assert same == Scores(1.0, 1.0, 1.0, 1.0, 1.0)
    failed = score(reference, "no")
    assert failed == Scores(0.0, 0.0, 0.0, 0.0, 0.0)
    assert dataclasses.astuple(mean_scores([same, failed])) == (0.5,) * 5
    with pytest.raises(ValueError, match="no scores"):
        mean_scores([])


_ACCEPTED = (
    {"to": OneOf(("Ann", "Ann Smith")), "text": OneOf((["x", OneOf(("y", "z"))], "all"))},
    {
        "to": OneOf(("Ann",)),
        "text": OneOf(({"k": OneOf((1,), True)},), True),
        "now": OneOf((True,)),
    },
    {},
)


@pytest.mark.parametrize(
    ("predicted", "aware"),
    [
        ('1. send("Ann", "all")\n2. send("Ann", {"k": 1}, True)\n3. join()', 1),
        ('1. send("ann smith", ["x", "Z"])\n2. send("Ann", {}, True)\n3. join()', 1),
        ('1. send("Ann", now=True)\n2. send("Ann", ["x", "y"])\n3. join()', 1),
        ('1. send("Ann", ["x", "w"])\n2. send("Ann", {}, True)\n3. join()', 0),
        ('1. send("Ann", "all")\n2. send("Ann", {"k": 2}, True)\n3. join()', 0),
        ('1. send("Ann", "all")\n2. send("Ann", {"m": 1}, True)\n3. join()', 0),
        ('1. send("Ann", "all")\n2. send("Ann", {})\n3. join()', 0),
        ('1. send("Ann")\n2. send("Ann", {}, True)\n3. join()', 0),
        ('1. send("Ann", "all", more=1)\n2. send("Ann", {}, True)\n3. join()', 0),
        ('1. send("Ann", "all")\n2. send("Ann", "all")\n3. join()', 0),
    ],
)
def test_any_accepted_value_is_right(predicted, aware):
    record = _record('1. send("Ann", "all")\n2. send("Ann", now=True)\n3. join()', _ACCEPTED)
    scores = score(record, predicted)
    assert (scores.success, scores.aware_success) == (1, aware)


def _random_plan(rng):
    """Up to four calls of few tools, whose arguments are mostly results, earlier or later."""
    count = rng.randint(1, 4)
    while True:
        calls = []
        for number in range(1, count + 1):
            others = [i for i in range(1, count + 1) if i != number]

            def value(others=others):
                return Ref(rng.choice(others)) if others and rng.random() < 0.8 else "x"

            values = [
                [value() for _ in range(rng.randint(0, 2))] if rng.random() < 0.3 else value()
                for _ in range(rng.randint(0, 2))
            ]
            calls.append(Call(rng.choice("ab"), tuple(map(Argument, values))))
        try:
            return Plan((*calls, Call(JOIN)))
        except PlanError:  # Calls that wait for each other.
            continue


def _refs(call):
    """Calls that a call depends on, in the order of its arguments."""
    flat = []
    for argument in call.arguments:
        flat += argument.value if isinstance(argument.value, list) else [argument.value]
    return [item.call for item in flat if isinstance(item, Ref)]


def _tree(plan, number):
    call = plan.calls[number - 1]
    inputs = [_tree(plan, ref) for ref in _refs(call)]
    return call.tool, sorted(inputs, key=lambda tree: tree[0])


def _matchings(one, other):
    count = len(one.calls)
    if count == len(other.calls):
        for order in itertools.permutations(range(1, count + 1)):
            yield dict(zip(range(1, count + 1), order, strict=True))


def _oracle(one, other):
    for match in _matchings(one, other):
        edges = {(match[k], match[i]) for i, c in enumerate(one.calls, 1) for k in _refs(c)}
        if edges == {(k, i) for i, c in enumerate(other.calls, 1) for k in _refs(c)} and all(
            _tree(one, i) == _tree(other, j) for i, j in match.items()
        ):
            return True
    return False


def _aware_oracle(one, other):
    def moved(value, match):
        if isinstance(value, list):
            return [moved(item, match) for item in value]
        return Ref(match[value.call]) if isinstance(value, Ref) else value

    return any(
        all(
            one.calls[i - 1].tool == other.calls[j - 1].tool
            and [moved(a.value, match) for a in one.calls[i - 1].arguments]
            == [a.value for a in other.calls[j - 1].arguments]
            for i, j in match.items()
        )
        for match in _matchings(one, other)
    )


def _shuffled(rng, plan):
    """The same plan in another order, or one with an argument less."""
    order = list(range(1, len(plan.calls)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order, start=1)}

    def moved(value):
        if isinstance(value, list):
            return [moved(item) for item in value]
        return Ref(place[value.call]) if isinstance(value, Ref) else value

    calls = []
    for old in order:
        arguments = [Argument(moved(a.value)) for a in plan.calls[old - 1].arguments]
        if rng.random() < 0.1:
            arguments = arguments[::-1]
        calls.append(Call(plan.calls[old - 1].tool, tuple(arguments)))
    return Plan((*calls, Call(JOIN)))


def test_success_is_what_a_search_through_all_matchings_finds():
    rng = random.Random(0)
    outcomes = set()
    for _ in range(400):
        one = _random_plan(rng)
        other = _shuffled(rng, one) if rng.random() < 0.7 else _random_plan(rng)
        scores = score(Record("x", "query", _TOOLS, one), write_plan(other))
        expected = (_oracle(one, other), _aware_oracle(one, other))
        assert (scores.success, scores.aware_success) == expected
        outcomes.add(expected)
    assert outcomes == {(True, True), (True, False), (False, False)}


def _many(count, references):
    """A plan of `count` calls of one tool, in which call i takes the results `references(i)`."""
    calls = []
    for i in range(1, count + 1):
        calls.append(Call("a", (Argument([Ref(k) for k in references(i)]),)))
    return Plan((*calls, Call(JOIN)))


@pytest.mark.timeout(20)
def test_long_plans_of_alike_calls_are_compared_quickly():
    rng = random.Random(0)
    two = {i: rng.sample(range(1, i), min(2, i - 1)) for i in range(1, 50)}
    plans = [
        _many(49, lambda i: []),
        _many(49, lambda i: range(1, i)),
        _many(49, lambda i: [i - 1] if i > 1 else []),
        _many(49, lambda i: [i - 1] if i % 7 != 1 else []),
        _many(49, lambda i: [i - 1] if i % 2 == 0 else []),
        _many(49, lambda i: two[i]),
        _many(49, lambda i: two[i] if i != 49 else [1, 2]),
        # A ring of 48 calls and two rings of 24: alike around every call.
        _many(48, lambda i: [i - 24, (i - 23) if i < 48 else 1] if i > 24 else []),
        _many(
            48,
            lambda i: [i - 24, (i - 23) if i % 12 else i - 35] if i > 24 else [],
        ),
    ]
    for i, one in enumerate(plans):
        for j, other in enumerate(plans):
            scores = score(Record("x", "query", _TOOLS, one), write_plan(other))
            assert scores.success == (i == j)


@pytest.mark.timeout(20)
def test_many_alike_calls_with_choices_are_compared_quickly():
    text = "".join(f'{i}. send("Ann", "x")\n' for i in range(1, 41)) + "41. join()"
    choices = {"to": OneOf(("Ann", "Bob")), "text": OneOf(("x",))}
    record = _record(text, ({**choices},) * 40 + ({},))
    assert score(record, text).aware_success == 1
    wrong = text.replace('40. send("Ann", "x")', '40. send("Eve", "x")')
    assert (
        score(record, wrong).success,
        score(record, wrong).aware_success,
    ) == (1, 0)


def test_isomorphism_looks_at_labels_and_directions():
    path = Graph("aab", {(0, 1): "x", (1, 2): "y"})
    assert isomorphic(path, Graph("baa", {(1, 2): "x", (2, 0): "y"}))
    assert not isomorphic(path, Graph("aab", {(0, 1): "x", (2, 1): "y"}))
    assert not isomorphic(path, Graph("aab", {(0, 1): "y", (1, 2): "x"}))
    assert not isomorphic(path, Graph("abb", {(0, 1): "x", (1, 2): "y"}))
    assert not isomorphic(path, Graph("aab", {(0, 1): "x"}))
