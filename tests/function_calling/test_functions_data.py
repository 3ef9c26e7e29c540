"""Three formats into one record, and one clear line for each kind of bad input."""

import json
import shutil
from pathlib import Path

import pytest

from examples.common.errors import DataError
from examples.finetune.planner.data import bfcl, load_bfcl, load_nestful, load_tinyagent, nestful
from examples.finetune.planner.plans.parse import write_plan
from examples.finetune.planner.plans.plan import Ref, Text
from examples.finetune.planner.plans.records import MISSING, OneOf, Parameter, Record

FIXTURES = Path(__file__).parent / "fixtures"


def _nestful():
    return load_nestful(FIXTURES / "nestful", ("executable",))


def _bfcl():
    return load_bfcl(FIXTURES / "bfcl", ("parallel",))


def test_tinyagent():
    first, second = load_tinyagent(FIXTURES / "tinyagent.json")
    assert (first.id, len(first.tools)) == ("7c1f0d4e-1", 16)
    assert write_plan(first.plan) == (
        '1. get_email_address("Ann Smith")\n'
        '2. get_zoom_meeting_link("Planning", "2024-05-31 14:00:00", 60, ["$1"])\n'
        '3. compose_new_email(["$1"], [], "Planning", "Join at ${2}, it costs $$300.", [])\n'
        "4. join()\n"
        "<END_OF_PLAN>"
    )
    link = first.plan.calls[2].arguments[3].value
    assert link == Text(("Join at ", Ref(2), ", it costs $300."))
    assert write_plan(second.plan).startswith(
        '1. create_reminder(name="Pay", due_date=None, notes="", priority=0, all_day=True)\n'
    )


def test_nestful():
    first, second = _nestful()
    assert (first.id, second.id) == ("executable/0", "executable/1")
    assert first.query == "Flights from Oslo to Rome, for $100 to $200."
    assert write_plan(first.plan) == (
        '1. Air_com_Search_Airport(query="Oslo")\n'
        '2. Air_com_Search_Airport(query="Rome", limit=2)\n'
        '3. Search_Flights(from="$1.skyId", to="$2[0].skyId", cabin="$$100-$$200")\n'
        "4. join()\n"
        "<END_OF_PLAN>"
    )
    assert write_plan(second.plan) == (
        '1. Air_com_Search_Airport(query="Oslo")\n'
        '2. Calculate(numbers="${1.Air Miles} * 1.6 + $1.position.lat")\n'
        '3. Calculate(numbers="$2")\n'
        '4. Calculate(numbers="$3")\n'
        "5. join()\n"
        "<END_OF_PLAN>"
    )
    airport, flights, _ = first.tools
    assert airport.parameters[1] == Parameter("limit", "number", "How many.", False, 1)
    assert [field.name for field in airport.returns] == ["skyId", "position"]
    assert flights.parameters[0].default is MISSING
    assert flights.parameters[2] == Parameter(
        "cabin", "", "Class.", False, "economy", ("economy", "first")
    )


def test_bfcl():
    first, second = _bfcl()
    assert first.query == "Be brief.\nPlay Bach for 20 minutes and Verdi, shuffled."
    assert write_plan(first.plan) == (
        '1. spotify_play(artist="Bach", duration=20, device="phone")\n'
        '2. spotify_play(artist="Verdi", options={"shuffle": True}, device="")\n'
        "3. join()\n"
        "<END_OF_PLAN>"
    )
    assert first.accepted[0]["artist"] == OneOf(("Bach", "J. S. Bach"))
    assert first.accepted[1]["duration"] == OneOf(("", 60), optional=True)
    assert first.tools[0].parameters[3].choices == ("phone", "tv")
    assert write_plan(second.plan).startswith('1. math_factorial(n=7, steps=[{"at": 1}])\n')


_TINYAGENT_BAD = [
    (lambda d: d["7c1f0d4e-2"].pop("input"), 'with a string "input", got the fields output'),
    (lambda d: d["7c1f0d4e-2"].update(input=3), 'with a string "input", got "input": 3'),
    (lambda d: d.update({"7c1f0d4e-2": ["x"]}), 'with a string "input", got ["x"]'),
    (lambda d: d["7c1f0d4e-2"].update(input=" "), "the query is empty"),
    (lambda d: d["7c1f0d4e-2"].update(input="\ud83d"), "the query holds half a surrogate pair"),
    (lambda d: d["7c1f0d4e-2"].update(output=[]), 'no output of type "plan"'),
    (lambda d: _steps(d)[0].update(tool_name="fly"), "call 1: unknown tool fly"),
    (lambda d: _steps(d)[0].pop("tool_name"), ', call 1: expected an object with a string "tool_n'),
    (lambda d: _steps(d)[0].pop("tool_args"), ', call 1: expected "tool_args" to be a list or an'),
    (lambda d: _steps(d)[0].update(tool_args=["$9"]), "call 1: $9 is out of range"),
    (lambda d: _steps(d)[0].update(tool_args=["$1"]), "call 1: $1 is the result of the call it"),
    (lambda d: _steps(d)[0].update(tool_args={"a b": 1}), "must be an identifier, got 'a b'"),
    (lambda d: _steps(d)[0].update(tool_args=[float("nan")]), "a number must be finite, got nan"),
    (lambda d: _steps(d)[0].update(tool_args=[_nested(40)]), "call 1: nested more than 16 deep"),
    (lambda d: _steps(d).pop(), "the plan does not end with join"),
    (lambda d: _steps(d).clear(), "a plan has 1 to 50 calls, got 0"),
]


@pytest.mark.parametrize("content", ["$1.50", "Lunch at $1.50 and $12,000", "$5.00 or $7"])
def test_amounts_of_money_in_tinyagent_are_text(tmp_path, content):
    data = json.loads((FIXTURES / "tinyagent.json").read_text())
    _steps(data)[1]["tool_args"] = [content]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(data))
    changed = {record.id: record for record in load_tinyagent(path)}["7c1f0d4e-2"]
    assert changed.plan.calls[1].arguments[0].value == content


def _steps(data):
    return data["7c1f0d4e-2"]["output"][0]["parsed_output"]


def _nested(depth):
    return [_nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(("spoil", "message"), _TINYAGENT_BAD, ids=[m for _, m in _TINYAGENT_BAD])
def test_bad_tinyagent_record_is_named_or_set_aside(tmp_path, spoil, message):
    data = json.loads((FIXTURES / "tinyagent.json").read_text())
    spoil(data)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(data))
    with pytest.raises(DataError) as caught:
        load_tinyagent(path)
    assert str(caught.value).startswith(f"{path}: '7c1f0d4e-2'")
    assert message in str(caught.value) and "\n" not in str(caught.value)

    rejected: list[str] = []
    assert [record.id for record in load_tinyagent(path, rejected)] == ["7c1f0d4e-1"]
    assert rejected == [str(caught.value)]


_NESTFUL_BAD = [
    ("data", lambda d: d[1].pop("output"), 'record 1: expected an object with a list "output"'),
    ("data", lambda d: d[1]["output"][1].pop("label"), "record 1, call 2: expected an object with"),
    ("data", lambda d: d[1]["output"][1].update(name="Fly"), "record 1: call 2: unknown tool Fly"),
    (
        "data",
        lambda d: d[1]["output"][0]["arguments"].update(query="$var7.x$"),
        "record 1, call 1, argument query: $var7.x$ is the result of no earlier call",
    ),
    ("spec", lambda d: d[2].pop("query_parameters"), "tool 2 (Calculate): expected an object with"),
    ("spec", lambda d: d.append(d[2]), "record 0: two tools are called Calculate"),
    (
        "spec",
        lambda d: d[2]["query_parameters"].update(n=3),
        "parameter n must be an object, got 3",
    ),
    (
        "spec",
        lambda d: d[2]["query_parameters"]["numbers"].update(enum=5),
        'parameter numbers: "enum" must be a list, got 5',
    ),
]


@pytest.mark.parametrize(
    ("which", "spoil", "message"), _NESTFUL_BAD, ids=[b[2] for b in _NESTFUL_BAD]
)
def test_bad_nestful_record_is_named(tmp_path, which, spoil, message):
    shutil.copytree(FIXTURES / "nestful", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "executable" / f"executable-{which}.json"
    data = json.loads(path.read_text())
    spoil(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DataError) as caught:
        load_nestful(tmp_path, ("executable",))
    assert str(tmp_path) in str(caught.value) and message in str(caught.value)


def _schema(rows):
    return rows[1]["function"][0]["parameters"]


def _n(rows):
    return _schema(rows)["properties"]["n"]


def test_a_record_without_tools_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "bfcl", tmp_path, dirs_exist_ok=True)
    for which, empty in (("", {"function": []}), ("possible_answer", {"ground_truth": []})):
        path = tmp_path / which / "BFCL_v4_parallel.json"
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
        path.write_text("".join(json.dumps(row | empty) + "\n" for row in rows))
    with pytest.raises(DataError, match="there are no tools"):
        load_bfcl(tmp_path, ("parallel",))


_BFCL_BAD = [
    ("", lambda d: d[1].pop("function"), 'line 2: expected an object with a list "function"'),
    (
        "",
        lambda d: d[1].update(question=[[], []]),
        "line 2: expected a question of one turn, got 2",
    ),
    ("", lambda d: d[1].update(id="x"), "line 2: no answer with the id x in"),
    ("", lambda d: d[1]["function"][0].pop("parameters"), "line 2, tool math.factorial: expected"),
    ("possible_answer", lambda d: d[0].pop("ground_truth"), "line 1: expected an object with a li"),
    (
        "possible_answer",
        lambda d: d[0].update(ground_truth=[{"math.sqrt": {}}]),
        "line 1: call 1: unknown tool math_sqrt",
    ),
    (
        "possible_answer",
        lambda d: d[0]["ground_truth"][0]["math.factorial"].update(n=7),
        "line 1, call 1, argument n must be a list, got 7",
    ),
    ("possible_answer", lambda d: d[0]["ground_truth"][0].clear(), "must be an object of one tool"),
    ("", lambda d: _schema(d).update(required="n"), 'math.factorial: "required" must be a list'),
    ("", lambda d: _schema(d).update(required=5), 'math.factorial: "required" must be a list'),
    ("", lambda d: _n(d).update(enum=5), 'parameter n: "enum" must be a list, got 5'),
    ("", lambda d: _n(d).update(description=[1]), 'n: "description" must be a string, got [1]'),
    ("", lambda d: _n(d).update(default=float("nan")), "'n': a number must be finite, got nan"),
    ("", lambda d: _n(d).update(enum=["\ud83d"]), "'n': a text holds half a surrogate pair"),
    ("", lambda d: d[1]["function"][0].update(description="\ud83d"), "half a surrogate pair"),
]


@pytest.mark.parametrize(("which", "spoil", "message"), _BFCL_BAD, ids=[b[2] for b in _BFCL_BAD])
def test_bad_bfcl_record_is_named(tmp_path, which, spoil, message):
    shutil.copytree(FIXTURES / "bfcl", tmp_path, dirs_exist_ok=True)
    path = tmp_path / which / "BFCL_v4_parallel.json"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    spoil(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        load_bfcl(tmp_path, ("parallel",))
    assert f"{path}: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b" \n", "the file is empty"),
        (b'{"a": \xff}', "invalid UTF-8 at byte 6: Latin-1 or another encoding"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16, expected UTF-8"),
        (b'{"a": \0}', "1 NUL byte(s), the first at byte 6"),
        (b'{"a": ', "malformed JSON (Expecting value: line 1 column 7"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"5": {}, "5": {}}', "malformed JSON (the key '5' is there twice)"),
        (b"9" * 5000, "malformed JSON"),
        (b"[]", "must be an object, got []"),
    ],
)
def test_bad_file_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tinyagent(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("load", "package"), [(load_nestful, "nestful-wrapper==0.1.7"), (load_bfcl, "bfcl-eval==2026")]
)
def test_missing_package_names_the_install_command(monkeypatch, load, package):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(DataError, match=f"pip install --no-deps {package}"):
        load()


def test_versions_are_those_that_are_installed_with_the_makefile():
    pinned = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    for package in (bfcl.PACKAGE, nestful.PACKAGE):
        assert f"{package.distribution}=={package.version}" in pinned


def test_a_record_offers_each_tool_once():
    record = _bfcl()[0]
    with pytest.raises(ValueError, match="two tools are called spotify_play"):
        Record("x", "query", record.tools * 2, record.plan)
    with pytest.raises(ValueError, match="3 calls, but accepted arguments of 1"):
        Record("x", "query", record.tools, record.plan, ({},))
