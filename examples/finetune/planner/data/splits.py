"""Held-out records: all that share a combination of tools fall on one side.

A model that saw a combination in training could repeat its plan with other arguments; held-out
combinations ask for plans of a new form, from tools that were seen in other company. Data sets of
many tools are split by name instead: a held-out tool was not even on offer in training.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from examples.common.errors import DataError
from examples.finetune.planner.data.files import entry, expect, read_json
from examples.finetune.planner.plans.records import Record

NESTFUL_SPLITS = Path(__file__).with_name("nestful_splits.json")
"""The splits of NESTFUL's 1,300 records, written by `make_splits`."""

NAMES = ("train", "validation", "test")


class Group(NamedTuple):
    """All records of one combination of tools."""

    tools: tuple[str, ...]  # Sorted.
    records: tuple[str, ...]  # Ids, in the order of the data.


@dataclass(frozen=True)
class Splits:
    """The groups of each split, and which records they were made from.

    Raises:
      DataError: if a record or a combination of tools is in two places.
    """

    fingerprint: str
    train: tuple[Group, ...]
    validation: tuple[Group, ...]
    test: tuple[Group, ...]

    def __post_init__(self) -> None:
        seen: dict[tuple[str, ...] | str, str] = {}
        for name in NAMES:
            for group in getattr(self, name):
                for item in (group.tools, *group.records):
                    if item in seen:
                        raise DataError(f"{item} is in {seen[item]} and again in {name}")
                    seen[item] = name


class SplitRecords(NamedTuple):
    """The records themselves."""

    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]


def split_by_tools(
    records: Sequence[Record],
    *,
    held_out: float = 0.1,
    seed: int = 0,
    stratum: Callable[[Record], str] = lambda record: "",
    by_name: bool = False,
) -> Splits:
    """Groups by combination of tools, assigned by a hash of `seed` and the combination.

    Args:
      records: of one data set.
      held_out: at most this share of the records of each stratum is in the validation split, and
        again in the test split.
      seed: another one, other splits.
      stratum: a class of records that shall be in every split. A combination belongs to the
        stratum of its first record.
      by_name: put no tool, called or on offer, in two splits. A group is then all records that
        tools connect, and its combination all of their tools.
    """
    families = _families(records)
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        names = families[record.tools[0].name] if by_name else record.combination
        groups.setdefault(tuple(sorted(names)), []).append(record)
    strata: dict[str, list[tuple[str, ...]]] = {}
    for tools, members in groups.items():
        strata.setdefault(stratum(members[0]), []).append(tools)

    found: dict[str, list[Group]] = {name: [] for name in NAMES}
    for combinations in strata.values():
        limit = held_out * sum(len(groups[tools]) for tools in combinations)
        room = {"test": limit, "validation": limit, "train": float("inf")}
        for tools in sorted(combinations, key=lambda tools: _digest(seed, *tools)):
            ids = tuple(record.id for record in groups[tools])
            name = next(name for name in room if room[name] >= len(ids))
            room[name] -= len(ids)
            found[name].append(Group(tools, ids))
    return Splits(fingerprint(records), *(tuple(sorted(found[name])) for name in NAMES))


def apply_splits(records: Sequence[Record], splits: Splits) -> SplitRecords:
    """The records of each split, in their order.

    Raises:
      DataError: if these are not the records that the splits were made from.
    """
    where = {
        record: name
        for name in NAMES
        for group in getattr(splits, name)
        for record in group.records
    }
    if fingerprint(records) != splits.fingerprint or where.keys() != {r.id for r in records}:
        raise DataError(
            f"the splits were made from other records: {len(where)} with the fingerprint "
            f"{splits.fingerprint}, not these {len(records)} with {fingerprint(records)}"
        )
    return SplitRecords(
        *(tuple(record for record in records if where[record.id] == name) for name in NAMES)
    )


def read_splits(path: Path = NESTFUL_SPLITS) -> Splits:
    """Reads what `write_splits` wrote.

    Raises:
      DataError: for a damaged file, and for splits that share a combination of tools.
    """
    content = expect(read_json(path), dict, str(path))
    groups = {
        name: tuple(
            Group(*(_strings(group, key, f"{path}: {name}") for key in Group._fields))
            for group in expect(content.get(name), list, f"{path}: {name}")
        )
        for name in NAMES
    }
    try:
        return Splits(entry(content, "fingerprint", str, str(path)), **groups)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def write_splits(splits: Splits, path: Path) -> None:
    """Writes JSON with one line a group."""
    lines = [f'{{\n"fingerprint": {json.dumps(splits.fingerprint)}']
    for name in NAMES:
        groups = ",\n".join(json.dumps(group._asdict()) for group in getattr(splits, name))
        lines.append(f'"{name}": [\n{groups}\n]')
    path.write_text(",\n".join(lines) + "\n}\n", encoding="utf-8")


def fingerprint(records: Sequence[Record]) -> str:
    """A hash of ids, queries and tools, whatever the order of the records."""
    lines = sorted(json.dumps([record.id, record.query, record.plan.tools]) for record in records)
    return _digest(0, *lines)


def _families(records: Sequence[Record]) -> dict[str, frozenset[str]]:
    """The tools that records connect with each tool, itself among them."""
    families: dict[str, frozenset[str]] = {}
    for record in records:
        names = frozenset(tool.name for tool in record.tools)
        merged = names.union(*(families.get(name, names) for name in names))
        families |= dict.fromkeys(merged, merged)
    return families


def _strings(group: Any, key: str, where: str) -> tuple[str, ...]:
    return tuple(expect(item, str, f"{where}: {key}") for item in entry(group, key, list, where))


def _digest(seed: int, *items: str) -> str:
    return hashlib.blake2b(json.dumps([seed, *items]).encode(), digest_size=16).hexdigest()
