"""One typed record for every data set: a query, the tools on offer, and the plan."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from examples.common.text import has_half_pair
from examples.finetune.planner.plans.plan import (
    IDENTIFIER,
    JOIN,
    Plan,
    PlanError,
    Value,
    check_value,
)


class Missing(Enum):
    """The default value of a parameter that has none."""

    MISSING = "missing"


MISSING = Missing.MISSING


@dataclass(frozen=True)
class Parameter:
    """One input of a tool, or one field of its result."""

    name: str
    type: str = ""
    """As the data set says it: a help to the reader of a prompt, not checked."""
    description: str = ""
    required: bool = True
    default: Value | Missing = MISSING
    choices: tuple[Value, ...] = ()

    def __post_init__(self) -> None:
        default = () if self.default is MISSING else (self.default,)
        for value in (self.name, self.type, self.description, *default, *self.choices):
            try:
                check_value(value)
            except PlanError as error:
                raise ValueError(f"parameter {self.name!r}: {error}") from None


@dataclass(frozen=True)
class Tool:
    name: str
    """An identifier: see `identifier`."""
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    returns: tuple[Parameter, ...] = ()
    """The fields of the result, where they are known; not the fields of fields, which can be
    hundreds."""

    def __post_init__(self) -> None:
        if not IDENTIFIER.fullmatch(self.name) or self.name == JOIN:
            raise ValueError(f"the name of a tool must be an identifier, got {self.name!r}")
        if has_half_pair(self.description):
            raise ValueError(f"the description of {self.name} holds half a surrogate pair")
        if repeated := _repeated([parameter.name for parameter in self.parameters]):
            raise ValueError(f"the tool {self.name} has two parameters {repeated}")


@dataclass(frozen=True)
class OneOf:
    """Any of these values is right; where it is optional, none is right too."""

    options: tuple["Accepted", ...]
    optional: bool = False


Accepted = None | bool | int | float | str | OneOf | list["Accepted"] | dict[str, "Accepted"]
"""A value with choices inside, anywhere."""


@dataclass(frozen=True)
class Record:
    """A query and the right plan.

    Raises:
      ValueError: if the plan does not end with `join`, or calls a tool that is not on offer.
    """

    id: str
    """Unique within a data set, and the same in every run."""
    query: str
    tools: tuple[Tool, ...]
    """Every tool that could be offered with this query; `join` is not among them."""
    plan: Plan
    accepted: tuple[dict[str, Accepted], ...] | None = None
    """For data with more than one right answer: the accepted arguments of every call by name.
    None stands for the arguments of the plan."""
    labelled: tuple[Sequence[object], ...] | None = None
    """The arguments of every call as the data set has them, for the official score, which reads
    strings in its own way. None stands for the plan as it is written."""

    def __post_init__(self) -> None:
        if not self.query.strip():
            raise ValueError("the query is empty")
        if has_half_pair(self.id + self.query):
            raise ValueError("the id or the query holds half a surrogate pair")
        if not self.tools:
            raise ValueError("there are no tools")
        if repeated := _repeated([tool.name for tool in self.tools]):
            raise ValueError(f"two tools are called {repeated}")
        if not self.plan.joined:
            raise ValueError("the plan does not end with join")
        known = {tool.name for tool in self.tools}
        for number, tool in enumerate(self.plan.tools, start=1):
            if tool not in known:
                raise ValueError(f"call {number}: unknown tool {tool}")
        for name in ("accepted", "labelled"):
            arguments = getattr(self, name)
            if arguments is not None and len(arguments) != len(self.plan.calls):
                raise ValueError(
                    f"{len(self.plan.calls)} calls, but {name} arguments of {len(arguments)}"
                )

    @property
    def combination(self) -> frozenset[str]:
        """Tools of the plan, without order and number."""
        return frozenset(self.plan.tools)


def identifier(name: str) -> str:
    """The name that a tool has in plans: what cannot stand in one becomes "_".

    >>> identifier("Get_Hotel_Reviews(Tips)"), identifier("math.factorial")
    ('Get_Hotel_Reviews_Tips', 'math_factorial')
    """
    name = re.sub(r"\W+", "_", name).strip("_")
    return name if IDENTIFIER.fullmatch(name) and name != JOIN else f"_{name}"


def _repeated(names: list[str]) -> str | None:
    if len(set(names)) == len(names):
        return None
    return next(name for name in names if names.count(name) > 1)
