"""TinyAgent's data set (Erdogan et al. 2024), from a local file.

One JSON object of records by key. A record has an "input" and an "output": a list of what a
planner and a joiner wrote, of which the first of type "plan" is the plan. Its "parsed_output" is
the list of calls, `join` the last, each {"tool_name", "tool_args"}.
"""

from pathlib import Path
from typing import Any

from examples.common.errors import DataError
from examples.finetune.planner.data.files import entry, expect, located, read_json
from examples.finetune.planner.data.tinyagent_tools import TINYAGENT_TOOLS
from examples.finetune.planner.plans.plan import (
    REFERENCE,
    Argument,
    Call,
    Plan,
    Ref,
    Text,
    Value,
    from_json,
    reference_of,
    text_of,
)
from examples.finetune.planner.plans.records import Record


def load_tinyagent(path: Path, rejected: list[str] | None = None) -> list[Record]:
    """Reads the records of a file, in its order; ids are its keys.

    A string that is "$2", "${2}" or "$2.name" is the result of call 2, or a part of it. Inside a
    longer string it is that only if an earlier call has this number, and else an amount of money.

    Args:
      path: the JSON file.
      rejected: a list to which one line for each unusable record is added. Without it, the first
        one is an error.

    Raises:
      DataError: naming file, key and call.
    """
    records = []
    for key, row in expect(read_json(path), dict, str(path)).items():
        try:
            records.append(_record(key, row, f"{path}: {key!r}"))
        except DataError as error:
            if rejected is None:
                raise
            rejected.append(str(error))
    return records


def _record(key: str, row: Any, where: str) -> Record:
    query = entry(row, "input", str, where)
    outputs = entry(row, "output", list, where)
    plans = [output for output in outputs if entry(output, "type", str, where) == "plan"]
    if not plans:
        raise DataError(f'{where}: no output of type "plan"')
    steps = entry(plans[0], "parsed_output", list, where)
    calls = [_call(step, n, f"{where}, call {n}") for n, step in enumerate(steps, start=1)]
    labelled = tuple(_by_name(step["tool_args"]) for step in steps)
    with located(where):
        return Record(key, query, TINYAGENT_TOOLS, Plan(tuple(calls)), labelled=labelled)


def _by_name(arguments: list[Any] | dict[str, Any]) -> list[Any]:
    """The values, sorted by name where they have names."""
    if isinstance(arguments, list):
        return arguments
    return [arguments[name] for name in sorted(arguments)]


def _call(step: Any, number: int, where: str) -> Call:
    name = entry(step, "tool_name", str, where)
    arguments = step.get("tool_args")
    match arguments:
        case list():
            pairs: list[tuple[str | None, Any]] = [(None, value) for value in arguments]
        case dict():
            pairs = list(arguments.items())
        case _:
            raise DataError(f'{where}: expected "tool_args" to be a list or an object')

    def read(content: str) -> Value:
        return _read(content, number)

    with located(where):
        return Call(name, tuple(Argument(from_json(value, read), key) for key, value in pairs))


def _read(content: str, number: int) -> str | Ref | Text:
    if match := REFERENCE.fullmatch(content):
        return reference_of(match)
    parts: list[str | Ref] = []
    end = 0
    for match in REFERENCE.finditer(content):
        reference = reference_of(match)
        if 1 <= reference.call < number:
            parts += [content[end : match.start()], reference]
            end = match.end()
    return text_of([*parts, content[end:]])
