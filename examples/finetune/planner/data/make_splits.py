"""Writes nestful_splits.json again: `python -m examples.finetune.planner.data.make_splits`."""

import sys

from examples.common.errors import DataError
from examples.finetune.planner.data.nestful import load_nestful
from examples.finetune.planner.data.splits import (
    NESTFUL_SPLITS,
    Splits,
    apply_splits,
    split_by_tools,
    write_splits,
)
from examples.finetune.planner.plans.records import Record


def make_splits(records: list[Record]) -> Splits:
    """Splits in which every part of NESTFUL has its share."""
    return split_by_tools(records, stratum=lambda record: record.id.partition("/")[0])


def main() -> int:
    try:
        records = load_nestful()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    splits = make_splits(records)
    write_splits(splits, NESTFUL_SPLITS)
    sizes = (
        f"{len(part)} {name}" for name, part in apply_splits(records, splits)._asdict().items()
    )
    print(f"{NESTFUL_SPLITS}: {', '.join(sizes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
