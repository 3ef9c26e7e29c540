"""NESTFUL: nested sequences of calls (Basu et al. 2024), from the package `nestful-wrapper`.

Every call has a label, and later calls take its result as "$label.field$". In plans the labels are
numbers. The last entry of some sequences, `var_result`, names what the user wants to see; it is
`join` here, which hands on all results.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.common.errors import DataError
from examples.finetune.planner.data.files import entry, expect, located, optional, read_json
from examples.finetune.planner.plans.plan import (
    JOIN,
    Argument,
    Call,
    Plan,
    PlanError,
    Ref,
    Text,
    from_json,
    text_of,
)
from examples.finetune.planner.plans.records import MISSING, Parameter, Record, Tool, identifier
from examples.pretrained.packages import Package, locate_package

PACKAGE = Package("nestful-wrapper", "0.1.7", "data_v1")
PARTS = {
    "executable": "executable/executable",
    "glaive": "non-executable/non-executable-glaive",
    "sgd": "non-executable/non-executable-sgd",
    "complexfuncbench": "complexfuncbench/complexfuncbench",
}
"""The data set has four parts, each with tools of its own."""

_RESULT = "var_result"
_LABEL = r"\$(var_?[0-9]+)((?:[.\[][^$]*)?)"
_REFERENCE = re.compile(rf"{_LABEL}\$")
# One record forgets the dollar at the end.
_UNENDED = re.compile(r"\$(var_?[0-9]+)((?:\.\w+)*)")


def load_nestful(root: Path | None = None, parts: tuple[str, ...] = tuple(PARTS)) -> list[Record]:
    """Reads parts of the data set, in the order of its files.

    Args:
      root: the directory `data_v1`; by default that of the installed package.
      parts: names from `PARTS`. The ids of records are "part/position".

    Raises:
      DataError: naming file, record and call.
    """
    root = root or locate_package(PACKAGE, DataError)
    return [record for part in parts for record in _load_part(root, part)]


def _load_part(root: Path, part: str) -> list[Record]:
    spec = root / f"{PARTS[part]}-spec.json"
    tools = tuple(
        _tool(tool, f"{spec}: tool {i}")
        for i, tool in enumerate(expect(read_json(spec), list, str(spec)))
    )
    data = root / f"{PARTS[part]}-data.json"
    records = []
    for i, record in enumerate(expect(read_json(data), list, str(data))):
        where = f"{data}: record {i}"
        query = entry(record, "input", str, where).strip()
        calls = _calls(entry(record, "output", list, where), where)
        with located(where):
            records.append(Record(f"{part}/{i}", query, tools, Plan(calls)))
    return records


def _tool(tool: Any, where: str) -> Tool:
    name = entry(tool, "name", str, where)
    where = f"{where} ({name})"
    with located(where):
        return Tool(
            identifier(name),
            entry(tool, "description", str, where),
            _parameters(entry(tool, "query_parameters", dict, where), where),
            _parameters(entry(tool, "output_parameters", dict, where), where),
        )


def _parameters(parameters: dict[str, Any], where: str) -> tuple[Parameter, ...]:
    return tuple(
        _parameter(name, spec, f"{where}: parameter {name}") for name, spec in parameters.items()
    )


def _parameter(name: str, spec: Any, where: str) -> Parameter:
    expect(spec, dict, where)
    choices = optional(spec, "enum", list, where) or optional(spec, "allowed_values", list, where)
    return Parameter(
        name,
        spec.get("type") or "",  # Some are lists of names.
        optional(spec, "description", str, where),
        # Results have a list of names there.
        spec.get("required") is True,
        spec.get("default", spec.get("default_value", MISSING)),
        tuple(choices),
    )


def _calls(output: list[Any], where: str) -> tuple[Call, ...]:
    numbers: dict[str, int] = {}
    calls = []
    for number, step in enumerate(output, start=1):
        place = f"{where}, call {number}"
        name = entry(step, "name", str, place)
        if name == _RESULT and number == len(output):
            break
        arguments = []
        for key, value in entry(step, "arguments", dict, place).items():
            with located(f"{place}, argument {key}"):
                value = from_json(value, lambda content: _read(content, numbers))
            arguments.append(Argument(value, key))
        calls.append(Call(identifier(name), tuple(arguments)))
        # Three records use a label twice: what follows means the latest call of that label.
        numbers[entry(step, "label", str, place)] = number
    return (*calls, Call(JOIN))


def _read(content: str, numbers: Mapping[str, int]) -> str | Ref | Text:
    if unended := _UNENDED.fullmatch(content):
        return _reference(unended, numbers)
    parts: list[str | Ref] = []
    end = 0
    for match in _REFERENCE.finditer(content):
        parts += [content[end : match.start()], _reference(match, numbers)]
        end = match.end()
    return text_of([*parts, content[end:]])


def _reference(match: re.Match[str], numbers: Mapping[str, int]) -> Ref:
    label, path = match.groups()
    if label not in numbers:
        raise PlanError(f"{match[0]} is the result of no earlier call")
    return Ref(numbers[label], path)
