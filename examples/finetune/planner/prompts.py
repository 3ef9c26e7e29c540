"""What a model reads before it writes a plan: tools, rules, examples and the question."""

from collections.abc import Sequence

from examples.finetune.planner.parse import END_OF_PLAN
from examples.finetune.planner.plan import Value
from examples.finetune.planner.records import MISSING, Parameter, Record, Tool
from examples.finetune.planner.write import write_plan, write_value

_TASK = """\
Write a plan that answers the question with calls of the tools below. Calls that need nothing from
one another run at the same time, so let no call wait without need.
"""

_JOIN = """\
join()
   Waits for all calls above it and hands on their results. Ends every plan."""

_RULES = f"""\
Rules:
- One call a line, numbered 1, 2, 3 and so on.
- Call only tools of the list above, with the parameters that they have.
- Write values as in Python, in the order of the parameters or by name: tool("x", n=1).
- "$2" is the result of call 2, and "$2.id" its field id. Two dollars, "$$2", are the text $2.
- The last call is join(), and only the last. If the tools cannot help, it is the only one.
- After join() write {END_OF_PLAN}.
"""

_SEPARATOR = "###\n"


def write_prompt(
    query: str,
    tools: Sequence[Tool],
    examples: Sequence[Record] = (),
    *,
    instructions: Sequence[str] = (),
    details: bool = True,
) -> str:
    """The text before a plan, up to the line after the question.

    Args:
      query: the question.
      tools: those on offer, in this order; `join` is added.
      examples: questions and their plans to show.
      instructions: further rules, such as today's date.
      details: describe parameters and results too, not just name them.
    """
    described = [_describe(tool, details) for tool in tools] + [_JOIN]
    numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(described, start=1))
    rules = _RULES + "".join(f"- {rule}\n" for rule in instructions)
    shown = "".join(
        f"{_question(example.query)}{write_plan(example.plan)}\n{_SEPARATOR}"
        for example in examples
    )
    shown = f"Examples:\n\n{shown}\n" if shown else ""
    return f"{_TASK}\nTools:\n{numbered}\n\n{rules}\n{shown}{_question(query)}"


def _question(query: str) -> str:
    return f"Question: {query.strip()}\n"


def _describe(tool: Tool, details: bool) -> str:
    signature = ", ".join(map(_parameter, tool.parameters))
    lines = [f"{tool.name}({signature})", f"   {_one_line(tool.description)}"]
    if details:
        lines += [
            f"   {parameter.name}: {_one_line(parameter.description)}{_choices(parameter)}"
            for parameter in tool.parameters
            if parameter.description or parameter.choices
        ]
        if tool.returns:
            lines.append(f"   Result: {', '.join(field.name for field in tool.returns)}")
    return "\n".join(line for line in lines if line.strip())


def _parameter(parameter: Parameter) -> str:
    text = parameter.name
    if parameter.type:
        text += f": {parameter.type}"
    if parameter.default is not MISSING and parameter.default is not None:
        return f"{text} = {write_value(parameter.default)}"
    return text if parameter.required else f"{text} = None"


def _choices(parameter: Parameter) -> str:
    choices: tuple[Value, ...] = parameter.choices
    return f" One of {', '.join(map(write_value, choices))}." if choices else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
