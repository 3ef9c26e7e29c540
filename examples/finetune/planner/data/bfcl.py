"""BFCL: single-turn function calls with accepted answers, from the package `bfcl-eval`.

Questions and answers stand in two files of one name. The calls of an answer do not depend on one
another. An answer lists, for every argument, the values that are right, an empty string among them
where the argument may be left out.
"""

from pathlib import Path
from typing import Any

from examples.common.errors import DataError
from examples.finetune.planner.data.files import entry, expect, located, optional, read_json_lines
from examples.finetune.planner.plans.plan import JOIN, Argument, Call, Plan, Value
from examples.finetune.planner.plans.records import (
    MISSING,
    Accepted,
    OneOf,
    Parameter,
    Record,
    Tool,
    identifier,
)
from examples.pretrained.packages import Package, locate_package

PACKAGE = Package("bfcl-eval", "2026.3.23", "bfcl_eval/data")
CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
)

_OMITTED = ""


def load_bfcl(root: Path | None = None, categories: tuple[str, ...] = CATEGORIES) -> list[Record]:
    """Reads categories of the data set, in the order of its files.

    The plan of a record is made of the first accepted value of every argument; arguments whose
    first accepted value is to be left out are left out unless their parameter is required.

    Args:
      root: the directory `bfcl_eval/data`; by default that of the installed package.
      categories: names from `CATEGORIES`. Ids are those of the data set.

    Raises:
      DataError: naming file, line and call.
    """
    root = root or locate_package(PACKAGE, DataError)
    return [record for category in categories for record in _load(root, category)]


def _load(root: Path, category: str) -> list[Record]:
    name = f"BFCL_v4_{category}.json"
    answers = {}
    for where, answer in read_json_lines(root / "possible_answer" / name):
        answers[entry(answer, "id", str, where)] = where, answer
    records = []
    for where, row in read_json_lines(root / name):
        key = entry(row, "id", str, where)
        if key not in answers:
            raise DataError(
                f"{where}: no answer with the id {key} in {root}/possible_answer/{name}"
            )
        records.append(_record(key, row, where, *answers[key]))
    return records


def _record(key: str, row: Any, where: str, answer_where: str, answer: Any) -> Record:
    tools = tuple(_tool(spec, where) for spec in entry(row, "function", list, where))
    by_name = {tool.name: tool for tool in tools}
    query = _query(entry(row, "question", list, where), where)
    calls, accepted = [], []
    for number, step in enumerate(entry(answer, "ground_truth", list, answer_where), start=1):
        place = f"{answer_where}, call {number}"
        if len(expect(step, dict, place)) != 1:
            raise DataError(f"{place} must be an object of one tool, got {len(step)}")
        ((name, arguments),) = step.items()
        options = {
            argument: _one_of(values, f"{place}, argument {argument}")
            for argument, values in expect(arguments, dict, f"{place}: arguments").items()
        }
        accepted.append(options)
        calls.append(_call(identifier(name), options, by_name))
    with located(answer_where):
        plan = Plan((*calls, Call(JOIN)))
        return Record(key, query, tools, plan, (*accepted, {}))


def _query(turns: list[Any], where: str) -> str:
    if len(turns) != 1:
        raise DataError(f"{where}: expected a question of one turn, got {len(turns)}")
    messages = expect(turns[0], list, f"{where}: a turn")
    return "\n".join(entry(message, "content", str, where).strip() for message in messages)


def _tool(spec: Any, where: str) -> Tool:
    name = entry(spec, "name", str, where)
    where = f"{where}, tool {name}"
    schema = entry(spec, "parameters", dict, where)
    required = optional(schema, "required", list, where)
    with located(where):
        parameters = tuple(
            _parameter(key, value, key in required, f"{where}: parameter {key}")
            for key, value in entry(schema, "properties", dict, where).items()
        )
        return Tool(identifier(name), entry(spec, "description", str, where), parameters)


def _parameter(name: str, spec: Any, required: bool, where: str) -> Parameter:
    expect(spec, dict, where)
    return Parameter(
        name,
        optional(spec, "type", str, where),
        optional(spec, "description", str, where),
        required,
        spec.get("default", MISSING),
        tuple(optional(spec, "enum", list, where)),
    )


def _one_of(values: Any, where: str) -> OneOf:
    """The accepted values of an argument."""
    options = [_accepted(value, where) for value in expect(values, list, where)]
    # Without any value, what is meant is an empty list.
    return OneOf(tuple(options) or ([],), _OMITTED in options)


def _accepted(value: Any, where: str) -> Accepted:
    match value:
        case dict():
            return {
                key: _one_of(item, where) if isinstance(item, list) else item
                for key, item in value.items()
            }
        case list():
            return [_accepted(item, where) for item in value]
    return value


def _call(name: str, options: dict[str, OneOf], tools: dict[str, Tool]) -> Call:
    parameters = tools[name].parameters if name in tools else ()
    required = {parameter.name for parameter in parameters if parameter.required}
    arguments = (
        Argument(_first(accepted), argument)
        for argument, accepted in options.items()
        if accepted.options[0] != _OMITTED or argument in required
    )
    return Call(name, tuple(arguments))


def _first(accepted: Accepted) -> Value:
    """The first of the accepted values that is a value."""
    match accepted:
        case OneOf():
            values = [option for option in accepted.options if option != _OMITTED]
            return _first(values[0]) if values else _OMITTED
        case list():
            return [_first(item) for item in accepted]
        case dict():
            return {
                key: _first(item)
                for key, item in accepted.items()
                if not (isinstance(item, OneOf) and item.options[0] == _OMITTED)
            }
    return accepted
