"""The official score and the strict verdict, against answers that were worked out by hand."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from examples.finetune.planner.data.tinyagent_tools import TINYAGENT_TOOLS
from examples.finetune.planner.plans.metrics import score, verdict
from examples.finetune.planner.plans.official import officially_succeeds
from examples.finetune.planner.plans.parse import MAX_CHARACTERS, parse_plan, write_plan
from examples.finetune.planner.plans.plan import Plan
from examples.finetune.planner.plans.records import Record

_FILE = Path(__file__).parent / "fixtures" / "official_plans.toml"
_FIXTURE = tomllib.loads(_FILE.read_text(encoding="utf-8"))
_PLANS = _FIXTURE["plans"]


def _record(text):
    plan = parse_plan(text)
    assert isinstance(plan, Plan)
    return Record("x", "query", TINYAGENT_TOOLS, plan)


@pytest.mark.parametrize("row", _PLANS, ids=[f"{row['kind']}: {row['reason']}" for row in _PLANS])
def test_answers_worked_out_by_hand(row):
    record = _record(_FIXTURE["references"][row["reference"]])
    scores = score(record, row["text"])
    assert scores.success == row["official"]
    said = verdict(record, row["text"])
    assert said.startswith(row["strict"])
    assert scores.parsed == (not said.startswith("no plan"))
    assert scores.aware_success == (said == "right")


@pytest.mark.parametrize("name", _FIXTURE["references"])
def test_a_reference_as_it_is_written_succeeds_without_prices(name):
    record = _record(_FIXTURE["references"][name])
    # Prices that are results of no call, or of the call itself, are errors of the evaluator.
    unreadable = name in ("price_of_none", "price_of_itself")
    assert officially_succeeds(record, write_plan(record.plan)) != unreadable


_NAMED = """
1. get_phone_number(name="Ann Smith")
2. get_email_address(name="Bob Lee")
3. send_sms(recipients=["$1", "$2"], message="Lunch?")
4. join()"""


@pytest.mark.parametrize(
    ("predicted", "official"),
    [
        (_NAMED, True),
        (_NAMED.replace("name=", ""), True),
        (
            _NAMED.replace('recipients=["$1", "$2"], message="Lunch?"', '"Lunch?", ["$2", "$1"]'),
            True,
        ),
        (_NAMED.replace('["$1", "$2"]', '["$1"]'), False),
        (_NAMED.replace('"Lunch?"', '"Lunch at $2?"'), False),
        (_NAMED.replace('"Lunch?"', "null"), False),
    ],
)
def test_names_of_a_reference_with_names_are_dropped(predicted, official):
    assert officially_succeeds(_record(_NAMED), predicted) == official


_REFERENCE = _FIXTURE["references"]["sms"]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, len(_REFERENCE) - 1),
    st.integers(0, 3),
    st.text("1.$(){}[]\"', \\\nT", max_size=3),
)
def test_no_damage_raises(at, removed, inserted):
    damaged = _REFERENCE[:at] + inserted + _REFERENCE[at + removed :]
    assert officially_succeeds(_record(_REFERENCE), damaged) in (True, False)


_HOSTILE = [
    "1. f(" * 19_000,
    "1. join(x) " + "1. f(" * 19_000,
    ") " + "1. f(" * 19_000,
    "1" * 99_000,
    "9" * 90_000 + ". join()",
    "\n" * 99_000,
    "Thought: \n" * 9_000,
    "1. join(" + "[" * 90_000 + ")",
    "1. join(" + "-" * 90_000 + "1)",
    "1. join(" + "1+" * 45_000 + "1)",
    "1. join(" + "''" * 45_000 + ")",
    "1. join(" + "9" * 90_000 + ")",
    "1. join('$" + "9" * 90_000 + "')",
    "1. join('$" + "9" * 4000 + "')",
    "1. join('\0\ud800')",
    "1. join(" + "9" * 400 + "+1j)",
    "".join(f"{i}. get_phone_number('${i - 1}')\n" for i in range(2, 2_900)),
    "x" * (MAX_CHARACTERS + 1),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", _HOSTILE, ids=[text[:20] for text in _HOSTILE])
def test_hostile_text_fails_quickly(text):
    assert not officially_succeeds(_record(_REFERENCE), text)
    assert not officially_succeeds(_record(_NAMED), text)
