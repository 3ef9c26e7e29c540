"""Plans as text, for prompts and as what a model learns to write."""

import json

from examples.finetune.planner.parse import END_OF_PLAN
from examples.finetune.planner.plan import Argument, Plan, Ref, Text, Value
from examples.finetune.planner.references import write_string


def write_plan(plan: Plan) -> str:
    """The text that `parse_plan` reads as `plan`.

    Values are Python's literals in one line. References are strings, `"$1"` or `"$1.field"`, so
    that every parser of such literals can read them too.
    """
    actions = (
        f"{number}. {call.tool}({', '.join(map(_argument, call.arguments))})\n"
        for number, call in enumerate(plan.calls, start=1)
    )
    return "".join(actions) + END_OF_PLAN


def write_value(value: Value) -> str:
    """One value as a literal."""
    match value:
        case str() | Ref() | Text():
            return json.dumps(write_string(value), ensure_ascii=False)
        case list():
            return f"[{', '.join(map(write_value, value))}]"
        case dict():
            entries = (
                f"{json.dumps(key, ensure_ascii=False)}: {write_value(item)}"
                for key, item in value.items()
            )
            return f"{{{', '.join(entries)}}}"
    return repr(value)


def _argument(argument: Argument) -> str:
    name = "" if argument.name is None else f"{argument.name}="
    return name + write_value(argument.value)
