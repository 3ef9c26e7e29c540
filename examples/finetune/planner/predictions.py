"""Questions with the plans that a model wrote, as files to read."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from examples.finetune.planner.evaluate import Prediction
from examples.finetune.planner.plans.metrics import verdict
from examples.finetune.planner.plans.parse import write_plan


def write_predictions(
    predictions: Sequence[Prediction], directory: Path, *, title: str, shown: int
) -> None:
    """Writes predictions.json, and the first `shown` as a table into predictions.md."""
    rows = [_row(prediction) for prediction in predictions]
    text = json.dumps(rows, indent=2, ensure_ascii=False)
    (directory / "predictions.json").write_text(text + "\n", encoding="utf-8")
    right = sum(prediction.scores.aware_success == 1 for prediction in predictions)
    lines = [
        f"# {title}",
        "",
        f"{right} of {len(rows)} plans are right; {min(shown, len(rows))} are shown.",
        "",
        "| question | reference | written | verdict |",
        "|---|---|---|---|",
    ]
    columns = ("question", "reference", "written", "verdict")
    lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in rows[:shown]]
    (directory / "predictions.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(prediction: Prediction) -> dict[str, Any]:
    record, text = prediction.record, prediction.text
    said = verdict(record, text)
    return {
        "id": record.id,
        "question": record.query,
        "reference": write_plan(record.plan),
        "written": text,
        "verdict": said if prediction.ended else f"{said} (cut off: no end mark)",
        "scores": asdict(prediction.scores),
    }


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;")):
        text = text.replace(character, entity)
    return "<br>".join(text.strip().splitlines())
