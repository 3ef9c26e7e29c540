"""Prompts, from retrieved examples to pairs with the plans that a model learns to write."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import linear_kernel

from examples.common.errors import DataError
from examples.finetune.planner.plans.parse import END_OF_PLAN, write_plan, write_value
from examples.finetune.planner.plans.plan import Value
from examples.finetune.planner.plans.records import MISSING, Parameter, Record, Tool


class Retriever:
    """Similarity is the cosine of TF-IDF vectors of words and pairs of words.

    Raises:
      DataError: if no record has a word.
    """

    def __init__(self, train: Sequence[Record]):
        """Takes the records to choose from: the training split, and nothing that is held out."""
        self._records = tuple(train)
        self._vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        try:
            self._vectors = self._vectorizer.fit_transform([record.query for record in train])
        except ValueError as error:
            raise DataError(
                f"no question of the train split has a word of two letters ({error}): "
                "--examples 0 asks for no similar ones"
            ) from error

    def nearest(
        self, query: str, count: int, allowed: Callable[[Record], bool] = lambda record: True
    ) -> list[Record]:
        """Returns the `count` allowed records most like `query`, the nearest first.

        Of equally near ones the earlier comes first; fewer are returned if no more are allowed.
        """
        # The vectors have length 1, so that their product is the cosine.
        similarity = linear_kernel(self._vectorizer.transform([query]), self._vectors)[0]
        order = np.argsort(-similarity, kind="stable")
        found: list[Record] = []
        for i in order:
            if len(found) == count:
                break
            if allowed(self._records[i]):
                found.append(self._records[i])
        return found


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

_BRIEF = f"""\
Answer with calls of these tools in this form:
1. tool(name="text", other=2)
2. join()
{END_OF_PLAN}
"""

_SEPARATOR = "###\n"


def write_prompt(
    query: str,
    tools: Sequence[Tool],
    examples: Sequence[Record] = (),
    *,
    instructions: Sequence[str] = (),
    details: bool = True,
    brief: bool = False,
) -> str:
    """The text before a plan, up to the line after the question.

    Args:
      query: the question.
      tools: those on offer, in this order; `join` is added.
      examples: questions and their plans to show.
      instructions: further rules, such as today's date.
      details: describe parameters and results too, not just name them.
      brief: show the form of a plan instead of explaining it.
    """
    described = [_describe(tool, details) for tool in tools] + ([] if brief else [_JOIN])
    numbered = "\n".join(f"{i}. {text}" for i, text in enumerate(described, start=1))
    rules = (_BRIEF if brief else _RULES) + "".join(f"- {rule}\n" for rule in instructions)
    shown = "".join(
        f"{_question(example.query)}{write_plan(example.plan)}\n{_SEPARATOR}"
        for example in examples
    )
    shown = f"Examples:\n\n{shown}\n" if shown else ""
    task = "" if brief else f"{_TASK}\n"
    return f"{task}Tools:\n{numbered}\n\n{rules}\n{shown}{_question(query)}"


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


@dataclass(frozen=True)
class PromptConfig:
    """Contents of a prompt besides the question."""

    examples: int = 2
    """Records of the training split that are shown, those with the most similar questions."""
    negatives: int = 4
    """The least number of tools on offer that the plan does not use, if there are so many."""
    details: bool = True
    """Describe parameters and results of tools."""
    brief: bool = False
    """Show the form of a plan in four lines instead of explaining it."""
    instructions: tuple[str, ...] = ()
    """Further rules, such as today's date."""
    prompt_seed: int = 0
    """Seed of the tools that are offered besides, and of their order."""

    def __post_init__(self) -> None:
        for name in ("examples", "negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class Pair:
    """The text of one training example; only the completion is learned."""

    prompt: str
    completion: str


def make_pair(record: Record, retriever: Retriever | None, config: PromptConfig) -> Pair:
    """The prompt and the plan of a record of any split.

    Examples come from the retriever's training split, and never have the record's combination of
    tools: held-out combinations find none like themselves there, so training must not either, or a
    model learns to copy. The tools on offer are those of the plan, those of the examples, and
    others of the record until `negatives` are not needed, all of them shuffled.
    """
    examples: list[Record] = []
    if retriever is not None:
        examples = retriever.nearest(
            record.query,
            config.examples,
            lambda other: other.combination != record.combination and other.id != record.id,
        )
    # The most similar question comes last, next to the one to answer.
    examples = examples[::-1]
    return Pair(
        write_prompt(
            record.query,
            offered_tools(record, examples, config.negatives, config.prompt_seed),
            examples,
            instructions=config.instructions,
            details=config.details,
            brief=config.brief,
        ),
        write_plan(record.plan),
    )


def offered_tools(
    record: Record, examples: Sequence[Record], negatives: int, seed: int
) -> tuple[Tool, ...]:
    """The tools of a prompt; `seed` and the record's id say which are drawn, and their order."""
    rng = random.Random(f"{seed} {record.id}")
    known = {tool.name: tool for tool in record.tools}
    for example in examples:
        for tool in example.tools:
            if tool.name in example.combination:
                known.setdefault(tool.name, tool)
    shown = frozenset().union(*(example.combination for example in examples))
    others = [name for name in known if name not in record.combination | shown]
    missing = max(0, negatives - len(shown - record.combination))
    drawn = rng.sample(others, min(missing, len(others)))
    names = sorted({*record.combination, *shown, *drawn})
    rng.shuffle(names)
    return tuple(known[name] for name in names)
