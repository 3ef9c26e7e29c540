"""Write snippet_splits.json: `python -m examples.finetune.encoder.data.make_splits [ARCHIVE]`."""

import json
import random
import sys
from pathlib import Path

from examples.common.errors import DataError
from examples.finetune.encoder.data.snippets import (
    ARCHIVE,
    SPLITS,
    Snippet,
    fingerprint,
    read_archive,
    related,
)

SIZES = {"validation": 1000, "test": 2000}


def make_splits(snippets: list[Snippet], seed: int = 0) -> dict:
    """Whole groups of related sentences, drawn until each split is full; the rest is to train."""
    groups = related(snippets)
    random.Random(seed).shuffle(groups)
    splits: dict = {"fingerprint": fingerprint(snippets)}
    for name, size in SIZES.items():
        ids: list[int] = []
        for group in list(groups):
            if len(ids) + len(group) <= size:
                ids += group
                groups.remove(group)
            if len(ids) == size:
                break
        splits[name] = sorted(ids)
    return splits


def main() -> int:
    try:
        snippets = read_archive(Path(sys.argv[1]) if len(sys.argv) > 1 else ARCHIVE)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    splits = make_splits(snippets)
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in splits.items()]
    SPLITS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    held_out = {name: len(splits[name]) for name in SIZES}
    print(f"{SPLITS}: {len(snippets) - sum(held_out.values())} to train, {held_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
