"""Predictions of unlabelled rows, in the files that GLUE's server takes.

Names, header and labels are those that the formatter of nyu-mll/jiant writes, by authors of GLUE.
"""

from pathlib import Path

import numpy as np

from examples.finetune.encoder.data import Task


def write_submission(
    task: Task, labels: tuple[str, ...], predictions: dict[str, np.ndarray], directory: Path
) -> None:
    """Write the file of each split of `predictions`, with the columns index and prediction.

    Args:
      task: names the files.
      labels: of the classes, empty for a regression.
      predictions: by split, as `train_step.decisions` returns them, those of a regression in the
        unit of the labels, in the order of the file.
      directory: is made if it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for split, values in predictions.items():
        lines = ["index\tprediction"]
        for i, value in enumerate(values):
            lines.append(f"{i}\t{_written(task, labels, value)}")
        path = directory / task.submission[split]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _written(task: Task, labels: tuple[str, ...], value: float) -> str:
    if not task.regression:
        return labels[int(value)] if task.submits_names else str(int(value))
    if task.range is None:
        return repr(float(value))  # Labels may have any unit, and a large mean.
    # The server refuses numbers outside of the range of the labels.
    return f"{np.clip(value, *task.range):.3f}"
