"""Plans as models write them, right and wrong."""

import ast

import pytest
from hypothesis import given, settings, strategies as st

from examples.finetune.planner.plans.parse import MAX_CHARACTERS, parse_plan
from examples.finetune.planner.plans.plan import (
    Argument,
    Call,
    FailedPlan,
    Plan,
    PlanError,
    Ref,
    Text,
)

_EXPECTED = Plan(
    (
        Call("find", (Argument("Ann"),)),
        Call("send", (Argument([Ref(1)]), Argument("it's 3"), Argument(True, "now"))),
        Call("join"),
    )
)


@pytest.mark.parametrize(
    "text",
    [
        '1. find("Ann")\n2. send(["$1"], "it\'s 3", now=True)\n3. join()\n<END_OF_PLAN>\n',
        '1. find("Ann")\n2. send(["$1"], "it\'s 3", now=True)\n3. join()<END_OF_PLAN>',
        "1. find('Ann')\n2. send([$1], 'it\\'s 3', now=true)\n3. join()",
        '```python\n1. find("Ann",)\n2. send((${1},), "it\'s 3", now=True)\n3. join()\n```\nDone.',
        'Thought: 1. first find(her)\n1. find("Ann")  # by name\nThought: now 2. send(\n'
        '2. send(["${1}"], "it\\u0027s 3", now = True) -> sent\nThought: done\n3. join()',
        'Sure! Here is the plan:\n\n 1) find( "Ann" )\n\n'
        ' 2) send([\n"$1"\n],\n"it\'s 3",now=True)\n'
        "3) join()\n###\nQuestion: another\n1. find('Bob')\n2. join()",
        '- **1.** find("""Ann""")\r\n* 2. `send(["$1"], "it\'s 3", now=True)`\r\n3. join()\r\n',
        '1. find("Ann") 2. send(["$1"], "it\'s 3", now=True) 3. join()',
        '0. find("Ann")\n1. send(["$0"], "it\'s 3", now=True)\n2. join()',
        'Step 1: find("Ann")\n**step 2.** send(["$1"], "it\'s 3", now=True)\nStep 3) join()',
        '1. find ("Ann")\n2. send\t(["$1"], "it\'s 3", now=True)\n3. join ()',
        '1. find("Ann"\n2. send(["$1"], "it\'s 3", now=True 3. join(\n<END_OF_PLAN>',
        'Step 0: find ("Ann" Step 1: send (["$0"], "it\'s 3", now=True\n- Step 2: join (',
    ],
    ids=[
        *("plain", "same line", "json", "fence", "thoughts", "goes on", "markdown", "one line"),
        *("from zero", "steps", "blanks", "last parenthesis", "all of them"),
    ],
)
def test_what_models_write(text):
    assert parse_plan(text) == _EXPECTED


def test_values():
    text = (
        "1. f(1, -2.5, 1e3, .5, None, null, false, [], {}, {'a': [1, {\"b\": '$$1'}]}, "
        '"\\n\\t\\\\ \\q \\x41 \\ud83d\\ude00 \\/", \'"\', from="x", año=(1, 2), '
        "one=(1 ,), same=((\n1 ) ))"
    )
    call = parse_plan(text).calls[0]
    positional = [argument.value for argument in call.arguments if argument.name is None]
    assert repr(positional[:9]) == "[1, -2.5, 1000.0, 0.5, None, None, False, [], {}]"
    assert positional[9:] == [{"a": [1, {"b": "$1"}]}, "\n\t\\ \\q A \N{GRINNING FACE} /", '"']
    named = {argument.name: argument.value for argument in call.arguments if argument.name}
    assert named == {"from": "x", "año": [1, 2], "one": [1], "same": 1}


@pytest.mark.parametrize(
    "written",
    [
        *("0x1F", "0o17", "0b101", "-0XfF", "1_000", "1_0.5_0", "1_0e1_0", ".5"),
        *(
            'r"\\d $x"',
            "R'a'",
            'u"a"',
            "U'a'",
            '"a" "b"',
            """'a' "b" r'\\c'""",
            '"\\42\\101x\\1018"',
        ),
        *('"\\N{QUOTATION MARK}"', '"\\x41\\u00e9\\U0001F600"', '["a" "b", 1_0]', '{"a": "b" "c"}'),
    ],
)
def test_arguments_are_the_literals_of_python(written):
    (argument,) = parse_plan(f"1. f({written})").calls[0].arguments
    assert argument.value == ast.literal_eval(written)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("$1", Ref(1)),
        ("${1}", Ref(1)),
        ("$1.a_b[0].c", Ref(1, ".a_b[0].c")),
        ("${1.Exchange Rate}", Ref(1, ".Exchange Rate")),
        ("at $1.", Text(("at ", Ref(1), "."))),
        ("$1 and ${1}", Text((Ref(1), " and ", Ref(1)))),
        ("$$1", "$1"),
        ("$$$1", Text(("$", Ref(1)))),
        ("$$$$1", "$$1"),
        ("$ 1 $$ ${} $x ${1", "$ 1 $$ ${} $x ${1"),
    ],
)
def test_references_in_strings(content, value):
    assert parse_plan(f'1. a()\n2. f("{content}")').calls[1].arguments[0].value == value


@pytest.mark.parametrize(
    "content",
    [
        "$1.50",
        "Lunch is $1.50, dinner $5.00.",
        "$0.99",
        "$1,500",
        "$1,234,567.89 a year",
        "It costs $5",
        "between $3 and $300",
        "$25 each",
        "Costs $5.each",
        "$5.Thanks, $7.a[0]",
        "Pay $12345678901 now",
        "code $007 or ${7}",
    ],
)
def test_amounts_of_money_are_text(content):
    for argument in (f'"{content}"', f'["{content}"]', f'{{"note": "{content}"}}'):
        plan = parse_plan(f"1. a()\n2. f({argument})")
        assert isinstance(plan, Plan), plan
        assert plan.dependencies() == {1: set(), 2: set()}
    assert parse_plan(f'1. a()\n2. f("{content}")').calls[1].arguments[0].value == content


def test_results_next_to_amounts():
    plan = parse_plan('1. a()\n2. f("$1, ${1}.50 and $1.5 or $7.", "$1,$1")')
    assert [argument.value for argument in plan.calls[1].arguments] == [
        Text((Ref(1), ", ", Ref(1), ".50 and $1.5 or $7.")),
        Text((Ref(1), ",", Ref(1))),
    ]


def test_amounts_that_are_numbers_of_no_earlier_call():
    plan = parse_plan('1. a("$2 off")\n2. f(["$1"], "$2 each, $3 for $1")\n3. join()')
    assert plan.calls[0].arguments[0].value == "$2 off"
    assert plan.calls[1].arguments[1].value == Text(("$2 each, $3 for ", Ref(1)))


def test_amounts_where_numbers_begin_at_zero():
    plan = parse_plan('0. a()\n1. f("$0 of $1 or $5")\n2. g("$1 for $2, ${1.price}")\n3. join()')
    assert [plan.calls[i].arguments[0].value for i in (1, 2)] == [
        Text((Ref(1), " of $1 or $5")),
        Text((Ref(2), " for $2, ", Ref(2, ".price"))),
    ]


def test_without_last_parenthesis_calls_end_at_the_next_action():
    plan = parse_plan('1. f("2. g(", [\n3,\n4]\n2. g(5,\n3. h(')
    assert plan.calls == (
        Call("f", (Argument("2. g("), Argument([3, 4]))),
        Call("g", (Argument(5),)),
        Call("h"),
    )


def test_later_results_are_allowed_where_no_calls_wait_for_each_other():
    assert parse_plan('1. b("$2")\n2. a()\n3. join()').dependencies() == {
        1: {2},
        2: set(),
        3: set(),
    }


def test_without_join_or_end_mark():
    assert not parse_plan('1. find("Ann")').joined
    plan = parse_plan('1. find("Ann")\n<END_OF_PLAN>\n2. send("x")\n3. join()')
    assert plan.tools == ("find",)


_MILLION = 1_000_000
_HOSTILE = [
    ("", "no line that begins as"),
    ("I cannot help with that.", "no line that begins as"),
    ("1. join", "no line that begins as"),
    ("<END_OF_PLAN>\n1. join()", "no line that begins as"),
    ("0. f()\n2. join()", "expected call 1, found number 2"),
    ("2. f()\n3. join()", "expected call 1, found number 2"),
    ('0. f("$1")\n1. join()', "call 1: $2 is join, which has no result"),
    ("1. f()\n3. join()", "expected call 2, found number 3"),
    ("1. f()\n1. join()", "expected call 2, found number 1"),
    ('1. f("$1")', "call 1: $1 is the result of the call itself"),
    ('1. f("$2")\n2. g("$1")\n3. join()', "calls wait for each other: "),
    ('1. f("$2")\n2. g("$3")\n3. h({"a": [$1]})\n4. join()', "calls wait for each other: "),
    ('1. f("$5")\n2. join()', "call 1: $5 is out of range, the plan has 2 calls"),
    ('1. f("$5.name")\n2. join()', "call 1: $5 is out of range"),
    ('1. f("$0")\n2. join()', "call 1: $0 is out of range"),
    (f'1. f("${"9" * 5000}")\n2. join()', "call 1: $999999999 is out of range"),
    ("1. f($2)\n2. join()", "call 1: $2 is join, which has no result"),
    ('1. f("a\n2. join()', "call 1: quotes are not closed"),
    ("1. f('it's')\n2. join()", "call 1: expected a comma or ), found"),
    ("1. f([1", "expected a comma or ], found the end of the text"),
    ("1. f([", "the text ends inside a call"),
    ("1. f([1\n2. join()", "expected a comma or ], found '2. join()'"),
    ("1. f(x=", "the text ends inside a call"),
    ('1. f("a"\nThen\n2. join()', "expected a comma or ), found"),
    ("1. f([1)", "expected a comma or ]"),
    ("1. f(,)", "expected a value, found ',)'"),
    ('1. f({1: "a"})', "expected a key in quotes"),
    ('1. f({"a" 1})', "expected a colon after a key"),
    ("1. f(x)", "expected a value, found 'x)'"),
    ("1. f(5pm)", "expected a comma or ), found 'pm"),
    ("1. f(NaN)", "expected a value"),
    ("1. f(1e999)", "a number must be finite"),
    (f"1. f({'9' * 5000})", "a whole number has more than 40 digits"),
    ("1. f(a=1, 2)", "a named argument stands before one without a name"),
    ("1. f(a=1, a=2)", "two arguments have the same name"),
    ('1. f("\\ud83d")', "half a surrogate pair"),
    ('1. f("\\UFFFFFFFF")', "there is no character"),
    ('1. f(__import__("os").system("true"))', "expected a value, found '__import__"),
    ('1. f(open("/etc/passwd").read())', "expected a value, found 'open"),
    ("1. f([x for x in ()])", "expected a value"),
    ("1. f(9**9**9**9)", "expected a comma or )"),
    ("1. f(" + "[" * 50_000, "nested more than 16 deep"),
    ("1. f(" + '{"a":' * 10_000, "nested more than 16 deep"),
    ("1. f(" + "(" * 40_000 + ")" * 40_000, "nested more than 16 deep"),
    ("x" * _MILLION, f"more than {MAX_CHARACTERS}"),
    ('1. f("' + "a" * _MILLION + '")', "characters"),
    ("".join(f"{i}. f()\n" for i in range(1, 60)), "more than 50 calls"),
    ("1. f(" + "$1," * 30_000 + ")", "$1 is the result of the call itself"),
    ('1. f("' + "\\" * 99_000, "quotes are not closed"),
    ("1. f(" + '""' * 49_000 + "x", "expected a comma or )"),
    ("1. f(0x" + "9" * 99_000, "a whole number has more than"),
    ('1. f("\\0")', "a text holds NUL"),
    ('1. f("\\N{NO SUCH CHARACTER}")', "there is no character"),
    ("1. f(" + "9" * 99_000 + "x", "a whole number has more than"),
    ("1. f(" + "-" * 99_000, "expected a value"),
    ("1. f(" + "a" * 99_000, "expected a value"),
    ('1. f("' + "$" * 99_000, "quotes are not closed"),
    (" " * 99_000, "no line that begins as"),
    ("1" * 99_000, "no line that begins as"),
    ("1. " * 33_000, "no line that begins as"),
    ("`" * 99_000 + "1.", "no line that begins as"),
    (("`" * 300 + "\n") * 300, "no line that begins as"),
    ("1. " + "f" * 99_000, "no line that begins as"),
    ("1. f()\n" + "2. g\n" * 19_000 + "9. h()", "expected call 2, found number 9"),
]


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("text", "reason"), _HOSTILE, ids=[t[:30] + r[:20] for t, r in _HOSTILE])
def test_hostile_text_fails_with_a_reason(text, reason):
    failed = parse_plan(text)
    assert isinstance(failed, FailedPlan)
    assert reason in failed.reason
    assert len(failed.reason) < 200 and "\n" not in failed.reason


@settings(max_examples=80, deadline=None)
@given(st.text() | st.text("123.f(){}[]'\"$,:=\\ \nTjoin#`<", max_size=80).map("1. f(".__add__))
def test_no_text_raises(text):
    assert isinstance(parse_plan(text), Plan | FailedPlan)


_WHOLE = '1. f("a $$2", [1, {"b": None}])\n2. g("${1.x y}", n=-1.5e3)\n3. join()\n<END_OF_PLAN>'


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(_WHOLE) - 1), st.integers(0, 3), st.text(max_size=3))
def test_no_damage_raises(at, removed, inserted):
    damaged = _WHOLE[:at] + inserted + _WHOLE[at + removed :]
    assert isinstance(parse_plan(damaged), Plan | FailedPlan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan(()), "1 to 50 calls, got 0"),
        (lambda: Plan((Call("join"), Call("f"))), "call 1: join ends a plan"),
        (lambda: Plan((Call("f g"),)), "call 1: the name of a tool must be an identifier"),
        (lambda: Plan((Call("f", (Argument(1j),)),)), "cannot be a complex"),
        (lambda: Plan((Call("f", (Argument({1: 2}),)),)), "key of a dictionary must be a text"),
        (lambda: Ref(1, "name"), "must look like .name or"),
        (lambda: Ref(-1), "cannot have the number -1"),
        (lambda: Text(("a", "b")), "not the parts of a text"),
        (lambda: Text((Ref(1),)), "not the parts of a text"),
    ],
)
def test_plans_are_checked_when_they_are_made(make, message):
    with pytest.raises(PlanError, match=message):
        make()
