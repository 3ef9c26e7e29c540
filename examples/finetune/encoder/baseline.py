"""Baseline without a language model: logistic regression on tf-idf."""

import warnings

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from examples.finetune.encoder.data import Row, Rows, Task
from examples.finetune.encoder.scores import scores

MOST_ROWS = 50_000
"""Training rows above which there is no baseline: it would take longer than some fine-tunings."""

_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)


def baseline_scores(task: Task, rows: Rows) -> dict[str, dict[str, float]] | None:
    """Metrics of every evaluated split; None for a regression, for more than `MOST_ROWS` training
    rows, without words or with one label.

    Words and pairs of words; the regularisation that does best on the first evaluated split.
    """
    if task.regression or len(rows.splits["train"]) > MOST_ROWS:
        return None
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    texts = list(map(_text, rows.splits["train"]))
    labels = {name: np.array([row.label for row in part]) for name, part in rows.splits.items()}
    of_one_label = len(set(labels["train"])) == 1
    if of_one_label or not any(map(words.build_analyzer(), texts)):
        return None
    x = words.fit_transform(texts)
    features = {name: words.transform(map(_text, rows.splits[name])) for name in task.held_out}

    def fit(strength: float) -> dict[str, dict[str, float]]:
        model = LogisticRegression(C=strength, max_iter=1000)
        with warnings.catch_warnings():
            # That many classes might be numbers: here they are classes.
            warnings.filterwarnings("ignore", "The number of unique classes")
            model.fit(x, labels["train"])
        return {
            name: scores(task.metrics, labels[name], model.predict(features[name]))
            for name in task.held_out
        }

    first, main = task.validation[0], task.metrics[0]
    return max(map(fit, _STRENGTHS), key=lambda found: found[first][main])


def _text(row: Row) -> str:
    return row.first if row.second is None else f"{row.first} {row.second}"
