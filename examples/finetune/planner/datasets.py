"""Names to data sets, each in a training, a validation and a test split."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from examples.common.errors import ConfigError, DataError
from examples.finetune.planner.data import (
    apply_splits,
    load_bfcl,
    load_nestful,
    load_tinyagent,
    split_by_tools,
)
from examples.finetune.planner.data.bfcl import CATEGORIES
from examples.finetune.planner.data.make_splits import make_splits
from examples.finetune.planner.data.nestful import PARTS
from examples.finetune.planner.data.splits import NAMES, SplitRecords, fingerprint, read_splits


class Source(NamedTuple):
    """Source of records."""

    path: Path | None  # None is the package.
    parts: tuple[str, ...]  # None of them are all.
    skip_unusable: bool
    held_out: float = 0.1  # TinyAgent: share of the records that validate, and of those that test.


class Dataset(NamedTuple):
    """Records that can be trained on."""

    splits: SplitRecords
    notes: list[str]


def load_dataset(name: str, source: Source) -> Dataset:
    """Reads a data set and splits it: no combination of tools is in two splits, of BFCL no tool.

    Raises:
      ConfigError: for a part that it does not have, and options that it has no use for.
      DataError: for files that are missing or wrong, and a split without records.
    """
    if source.skip_unusable and name != "tinyagent":
        raise ConfigError(f"skip_unusable is for tinyagent; {name} has records of one quality")
    if source.held_out != Source._field_defaults["held_out"] and name != "tinyagent":
        raise ConfigError(f"held_out is for tinyagent; {name} has splits of its own")
    found = DATASETS[name](source)
    empty = [split for split in NAMES if not getattr(found.splits, split)]
    if empty:
        raise DataError(
            f"{source.path or name}: the {empty[0]} split has no records: {source.held_out:g} of "
            "them are held out, by their tools: give more records"
            + (", or a larger --held-out" if name == "tinyagent" else "")
        )
    return found


def _nestful(source: Source) -> Dataset:
    parts = _known(source.parts, tuple(PARTS))
    # All of them are split, so that a part is split as it is within the whole.
    records = load_nestful(source.path) if source.path is None else load_nestful(source.path, parts)
    committed = read_splits()
    same = fingerprint(records) == committed.fingerprint
    splits = apply_splits(records, committed if same else make_splits(records))
    chosen = (
        tuple(record for record in split if record.id.partition("/")[0] in parts)
        for split in splits
    )
    notes = [] if same else ["not the records of the package: splits of their own"]
    return Dataset(SplitRecords(*chosen), notes)


def _bfcl(source: Source) -> Dataset:
    records = load_bfcl(source.path, _known(source.parts, CATEGORIES))

    def category(record):
        return re.sub(r"_\d.*", "", record.id)

    return Dataset(
        apply_splits(records, split_by_tools(records, stratum=category, by_name=True)), []
    )


def _tinyagent(source: Source) -> Dataset:
    if source.path is None:
        raise ConfigError("tinyagent has no package: --data FILE.json")
    _known(source.parts, ())
    rejected: list[str] = []
    records = load_tinyagent(source.path, rejected)
    if rejected and not source.skip_unusable:
        raise DataError(f"{rejected[0]}: --skip-unusable leaves out such records")
    if not records and not rejected:
        raise DataError(f"{source.path}: no records")
    if not records:
        count = len(rejected)
        raise DataError(f"{source.path}: no usable record, the first of {count}: {rejected[0]}")
    notes = [f"{len(rejected)} unusable records left out, first {rejected[0]}"] if rejected else []
    return Dataset(apply_splits(records, split_by_tools(records, held_out=source.held_out)), notes)


def _known(parts: tuple[str, ...], all_parts: tuple[str, ...]) -> tuple[str, ...]:
    for part in parts:
        if part not in all_parts:
            raise ConfigError(
                f"parts: no part is called {part!r}; there are {', '.join(all_parts) or 'none'}"
            )
    return parts or all_parts


DATASETS: dict[str, Callable[[Source], Dataset]] = {
    "nestful": _nestful,
    "bfcl": _bfcl,
    "tinyagent": _tinyagent,
}
