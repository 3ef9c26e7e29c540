"""The program on a small text, as arguments, and what it has written."""

import json
import random
from pathlib import Path

SMALL = {
    "optimizer": "adamw",
    "model.hidden": 16,
    "model.intermediate": 24,
    "model.layers": 2,
    "model.heads": 2,
    "model.kv-heads": 1,
    "vocab-size": 280,
    "seq-len": 8,
    "batch-size": 4,
}


def write_text(path: Path, words: int = 2000) -> None:
    """Random words, in rows of twenty."""
    text = random.Random(0).choices(["we", "the", "people", "of", "more", "perfect"], k=words)
    rows = [{"text": " ".join(text[i : i + 20])} for i in range(0, words, 20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(directory: Path, **options: object) -> list[str]:
    """A run in `directory`, which all runs of a test may share: they read the same text."""
    text = directory / "text.jsonl"
    if not text.exists():
        write_text(text, words=1000)
    places = {"data": text, "root": directory / "runs", "cache-dir": directory / "cache"}
    options = {name.replace("_", "-"): value for name, value in options.items()}
    return ["--model.stacked"] + [
        word
        for name, value in {**SMALL, **places, **options}.items()
        for word in _option(name, value)
    ]


def _option(name: str, value: object) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def losses(run: Path) -> list[tuple[str, int, float]]:
    """Kind, step and loss of every record, in all digits; a line that is being written is not."""
    log = run / "metrics.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    records = [json.loads(line) for line in lines]
    return [(r["kind"], r["step"], r["loss"]) for r in records]
