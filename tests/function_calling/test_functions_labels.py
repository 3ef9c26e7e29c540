"""Labels of TinyAgent: each succeeds officially as it is written, and fails without its results.

The public evaluator agrees on every text here, except on labels with names, which it cannot read.
Labels that take the result of no call (an amount of money, "$5") are errors of the evaluator: they
are not here.
"""

import json

import pytest

from examples.finetune.planner.data import load_tinyagent
from examples.finetune.planner.plans.metrics import score
from examples.finetune.planner.plans.official import officially_succeeds
from examples.finetune.planner.plans.parse import write_plan
from examples.finetune.planner.plans.plan import Argument, Call, Plan, Ref, Text
from examples.finetune.planner.plans.records import Record, Tool

_ADDRESS = ["get_email_address", ["Ann Smith"]]
_NOTE = ["open_note", ["Trip", ""]]
_PATH = ["open_and_get_file_path", ["budget.pdf"]]


def _mail(to="$1", text="Hello", files=()):
    return ["compose_new_email", [[to], [], "Trip", text, [*files]]]


def _append(text):
    return ["append_note_content", ["Trip", text, "Travel"]]


_LABELS = {
    "a result": [_ADDRESS, _mail()],
    "an end of an address": [_ADDRESS, _mail("$1.com")],
    "another end": [_ADDRESS, _mail("$1@example.com")],
    "an item": [_ADDRESS, _mail("$1[0]")],
    "an item of a field": [_ADDRESS, _mail("$1.addresses[0].work")],
    "an open bracket": [_ADDRESS, _mail("$1[first]")],
    "braces": [_ADDRESS, _mail("${1}")],
    "braces with a field": [_ADDRESS, _mail("${1.work}")],
    "braces with a blank": [_ADDRESS, _mail("${1.at work}")],
    "braces that are open": [_ADDRESS, _mail("${1")],
    "one with braces and one without": [_ADDRESS, _mail("$1", "Is ${1} right?")],
    "no blank after a sentence": [_NOTE, _append("See $1.Then go")],
    "the end of a sentence": [_NOTE, _append("See $1.")],
    "braces inside a sentence": [_NOTE, _append("See ${1}.Then go")],
    "letters after it": [_NOTE, _append("$1s")],
    "two dollars": [_NOTE, _append("$$1")],
    "three dollars": [_NOTE, _append("all $$$1")],
    "an amount that is a call": [_NOTE, _append("It costs $1.50")],
    "thousands": [_NOTE, _append("It costs $1,500")],
    "an amount of two calls before": [_ADDRESS, _NOTE, _append("$1.50 for $2")],
    "an amount that is a later call": [_append("It costs $2"), _NOTE],
    "a later result": [["summarize_pdf", ["$2"]], _PATH],
    "a part of a later result": [["summarize_pdf", ["$2.path"]], _PATH],
    "two results in one string": [_ADDRESS, _NOTE, _mail("$1", "$2 $1")],
    "results side by side": [_ADDRESS, _NOTE, _append("$1$2")],
    "a list of results": [_ADDRESS, _PATH, _mail(files=["$2"])],
    "a list in a list": [_ADDRESS, ["create_note", ["Trip", [["$1"]], "Travel"]]],
    "a dictionary": [_ADDRESS, ["create_note", ["Trip", {"to": "$1"}, "Travel"]]],
    "one argument": [_PATH, ["summarize_pdf", ["$1"]]],
    "one list": [_PATH, ["summarize_pdf", [["$1"]]]],
    "names": [_PATH, ["summarize_pdf", {"pdf_path": "$1.pdf"}]],
    "names out of order": [_PATH, _NOTE, ["create_note", {"name": "$1", "content": "$2.a"}]],
    "constants": [["create_reminder", ["Pay", None, "", "", 0, True]]],
    "quotes and lines": [_NOTE, _append('"$1"\nIt\'s \\$1 (or 2. join())')],
    "no argument": [["open_note", []]],
}
# What is written in the label, and instead in a text that fails.
_WRONG = {
    "an end of an address": ("$1.com", "1.com"),
    "an item": ("$1[0]", "1[0]"),
    "braces": ("${1}", "$1"),
    "no blank after a sentence": ("$1.Then", "Then"),
    "an amount that is a call": ("$1.50", "1.50"),
    "a part of a later result": ("$2.path", "path"),
    "names": ("$1.pdf", "1.pdf"),
}


def _load(tmp_path, steps):
    calls = [{"tool_name": tool, "tool_args": args} for tool, args in [*steps, ["join", []]]]
    row = {"input": "Please.", "output": [{"type": "plan", "parsed_output": calls}]}
    path = tmp_path / "records.json"
    path.write_text(json.dumps({"a": row}))
    (record,) = load_tinyagent(path)
    return record


def _in_python(steps):
    """As TinyAgent's model writes the label."""
    lines = []
    for number, (tool, arguments) in enumerate([*steps, ["join", []]], start=1):
        if isinstance(arguments, dict):
            written = [f"{name}={value!r}" for name, value in arguments.items()]
        else:
            written = map(repr, arguments)
        lines.append(f"{number}. {tool}({', '.join(written)})\n")
    return "".join(lines)


@pytest.mark.parametrize("name", _LABELS)
def test_a_label_succeeds_as_it_is_written(tmp_path, name):
    record = _load(tmp_path, _LABELS[name])
    assert officially_succeeds(record, _in_python(_LABELS[name]))
    scores = score(record, write_plan(record.plan))
    assert scores.success == scores.aware_success == 1


@pytest.mark.parametrize("name", _WRONG)
def test_a_label_fails_without_its_results(tmp_path, name):
    right, wrong = _WRONG[name]
    text = _in_python(_LABELS[name])
    assert right in text
    record = _load(tmp_path, _LABELS[name])
    assert not officially_succeeds(record, text.replace(right, wrong))


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        ("Pay $12345678901 now", "Pay $12345678999 now"),
        ("Pay $12345678901 now", "Pay $123456789 now"),
        ("code $007 now", "code $7 now"),
        ("code ${7} now", "code $7 now"),
    ],
)
def test_amounts_are_equal_as_they_are_written(tmp_path, reference, other):
    record = _load(tmp_path, [_NOTE, _append(reference)])
    for text in (reference, other):
        scores = score(record, _in_python([_NOTE, _append(text)]))
        assert scores.aware_success == (text == reference)


def test_a_label_that_holds_the_end_mark_is_not_cut():
    arguments = Argument("a <END_OF_PLAN> b")
    plan = Plan((Call("a", (arguments,)), Call("b"), Call("join")))
    record = Record("", "Please.", (Tool("a"), Tool("b")), plan)
    assert not officially_succeeds(record, '1. a("a')


def test_a_label_keeps_the_part_of_a_result(tmp_path):
    steps = [_ADDRESS, _NOTE, _mail("$1[0].work", "See $2.Then, or $7.Then, or ${2.at home}")]
    to, _, _, text, _ = (a.value for a in _load(tmp_path, steps).plan.calls[2].arguments)
    assert to == [Ref(1, "[0].work")]
    parts = ("See ", Ref(2, ".Then"), ", or $7.Then, or ", Ref(2, ".at home"))
    assert text == Text(parts)
