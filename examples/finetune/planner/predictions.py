"""Questions with the plans that a model wrote: files to read, and some of them side by side."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from examples.common.text import printable
from examples.finetune.planner.evaluate import Prediction
from examples.finetune.planner.plans.metrics import verdict
from examples.finetune.planner.plans.parse import END_OF_PLAN, write_plan

_JSON = "predictions.json"


def write_predictions(
    predictions: Sequence[Prediction], directory: Path, *, title: str, shown: int
) -> None:
    """Writes predictions.json, and the first `shown` as a table into predictions.md."""
    rows = [_row(prediction) for prediction in predictions]
    text = json.dumps(rows, indent=2, ensure_ascii=False)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _JSON).write_text(text + "\n", encoding="utf-8")
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


def side_by_side(run_dir: Path, names: Sequence[str], count: int) -> Group:
    """Questions, evenly spaced over the split, each with the plans in RUN_DIR/NAME of all names."""
    files = [json.loads((run_dir / name / _JSON).read_text(encoding="utf-8")) for name in names]
    total = len(files[0])
    count = min(count, total)
    parts: list[Rule | Text | Table] = []
    for i in (k * total // count for k in range(count)):
        first = files[0][i]
        plans = Table.grid(padding=(0, 2))
        plans.add_row("reference", _shown(first["reference"]), "")
        for name, rows in zip(names, files, strict=True):
            written = re.sub(r"\n\s*\n", "\n\n", rows[i]["written"].strip())
            plans.add_row(name, _shown(written), _shown(rows[i]["verdict"]))
        parts += [Rule(printable(first["id"])), _shown(first["prompt"].strip() + "\n"), plans]
    return Group(*parts)


def _shown(text: str) -> Text:
    """On a terminal, all of it."""
    return Text(printable(text), overflow="fold")


def _row(prediction: Prediction) -> dict[str, Any]:
    record, text = prediction.record, prediction.text
    said, ended = verdict(record, text), prediction.ended or END_OF_PLAN in text
    return {
        "id": record.id,
        "question": record.query,
        "prompt": prediction.prompt,
        "reference": write_plan(record.plan),
        "written": text,
        "verdict": said if ended else f"{said} (cut off: no end mark)",
        "scores": asdict(prediction.scores),
    }


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;")):
        text = text.replace(character, entity)
    return "<br>".join(text.strip().splitlines())
