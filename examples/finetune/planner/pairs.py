"""Prompts with the plans that a model learns to write after them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from examples.finetune.planner.prompts import write_prompt
from examples.finetune.planner.records import Record, Tool
from examples.finetune.planner.retrieval import Retriever
from examples.finetune.planner.write import write_plan


@dataclass(frozen=True)
class PromptConfig:
    """What stands in a prompt besides the question."""

    examples: int = 2
    """Records of the training split that are shown, those with the most similar questions."""
    negatives: int = 4
    """The least number of tools on offer that the plan does not use, if there are so many."""
    details: bool = True
    """Describe parameters and results of tools."""
    instructions: tuple[str, ...] = ()
    """Further rules, such as today's date."""
    prompt_seed: int = 0
    """Which tools are offered besides, and in which order."""

    def __post_init__(self) -> None:
        for name in ("examples", "negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class Pair:
    """The text of one training example; only the completion is learned."""

    id: str
    prompt: str
    completion: str

    @property
    def text(self) -> str:
        return self.prompt + self.completion

    @property
    def completion_span(self) -> tuple[int, int]:
        """The first character of `text` that is learned, and the one after the last."""
        return len(self.prompt), len(self.prompt) + len(self.completion)


def make_pair(record: Record, retriever: Retriever, config: PromptConfig) -> Pair:
    """The prompt and the plan of a record of any split.

    Examples come from the retriever's training split, and never have the record's combination of
    tools: held-out combinations find none like themselves there, so training must not either, or a
    model learns to copy. The tools on offer are those of the plan, those of the examples, and
    others of the record until `negatives` are not needed, all of them shuffled.
    """
    examples = retriever.nearest(
        record.query,
        config.examples,
        lambda other: other.combination != record.combination and other.id != record.id,
    )
    # The most similar question comes last, next to the one to answer.
    examples = examples[::-1]
    return Pair(
        record.id,
        write_prompt(
            record.query,
            offered_tools(record, examples, config.negatives, config.prompt_seed),
            examples,
            instructions=config.instructions,
            details=config.details,
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
