"""Bytes of the collectives of a compiled program."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:true_computation|false_computation)=%?([\w.\-]+)")
_LIST = re.compile(r"branch_computations=\{([^}]*)\}")


class Exchanged(NamedTuple):
    """Bytes of the results of all collectives, each counted once, also in a loop."""

    always: int
    sometimes: int  # within a branch of a conditional


def exchanged_bytes(hlo: str) -> Exchanged:
    """The collectives of a compiled program, ``compiled.as_text()``."""
    own: dict[str, int] = defaultdict(int)
    always: dict[str, set[str]] = defaultdict(set)
    branches: dict[str, set[str]] = defaultdict(set)
    entry = name = ""
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            entry = name if head[1] else entry
        if found := _COLLECTIVE.search(line):
            own[name] += sum(_size(*array) for array in _ARRAY.findall(found[1]))
        always[name] |= set(_CALLED.findall(line))
        branches[name] |= set(_BRANCHES.findall(line))
        for names in _LIST.findall(line):
            branches[name] |= {part.strip().lstrip("%") for part in names.split(",")}
    unconditional = _reachable(entry, [always])
    everything = _reachable(entry, [always, branches])
    return Exchanged(
        sum(own[c] for c in unconditional), sum(own[c] for c in everything - unconditional)
    )


def _reachable(start: str, edges: list[dict[str, set[str]]]) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [other for of in edges for other in of[name]]
    return seen


def _size(dtype: str, shape: str) -> int:
    return _BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)


def sent_bytes(hlo: str, devices: int) -> float:
    """Bytes that one device sends if every collective is a ring of all devices, branches included.

    Each collective is counted once, also in a loop.
    """
    share = (devices - 1) / devices
    # Of the bytes of its result.
    sent = {"all-reduce": 2 * share, "reduce-scatter": devices - 1, "collective-permute": 1.0}
    return sum(
        sent.get(found[2], share) * sum(_size(*array) for array in _ARRAY.findall(found[1]))
        for found in _COLLECTIVE.finditer(hlo)
    )
