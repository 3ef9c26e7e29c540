"""Metrics, the schedule and published protocols on known values."""

import math
import warnings

import numpy as np
import pytest

from examples.common.errors import DataError
from examples.common.schedule import warmup_linear
from examples.finetune.encoder.baseline import baseline_scores
from examples.finetune.encoder.data import TASKS, Row, Rows, unit_of
from examples.finetune.encoder.methods import MethodConfig
from examples.finetune.encoder.run_config import preset_config
from examples.finetune.encoder.scores import scores


def test_metrics_of_classes():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    found = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    expected = {
        "accuracy": 0.7,
        "f1": 6 / 9,
        "matthews": (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6),
    }
    assert scores(tuple(expected), labels, found) == pytest.approx(expected)
    nothing = scores(tuple(expected), labels, np.zeros_like(labels))
    assert nothing == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}


def test_metrics_of_numbers():
    labels = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = np.array([0.0, 0.0, 1.0, 3.0, 100.0])
    # Ranks with a tie: 1.5, 1.5, 3, 4, 5.
    ranks = np.array([1.5, 1.5, 3, 4, 5])
    expected = {
        "pearson": _pearson(labels, found),
        "spearman": _pearson(labels, ranks),
    }
    assert expected["spearman"] > 0.97 > 0.8 > expected["pearson"]
    assert scores(("pearson", "spearman"), labels, found) == pytest.approx(expected)
    constant = scores(("pearson", "spearman"), labels, np.ones(5))
    assert constant == {"pearson": 0.0, "spearman": 0.0}


def _pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / math.sqrt(x @ x * (y @ y)))


def test_learning_rate():
    schedule = warmup_linear(1.0, 0.2, 10)
    expected = [1 / 3, 2 / 3, *(1 - i / 8 for i in range(8))]
    assert [float(schedule(i)) for i in range(10)] == pytest.approx(expected)
    flat = warmup_linear(1.0, 0.0, 4)
    assert [float(flat(i)) for i in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("preset", "task", "rate", "batch", "scale"),
    [
        ("galore-rank-4", "mnli", 1e-5, 16, 4.0),
        ("galore-rank-4", "cola", 3e-5, 32, 4.0),
        ("galore-rank-8", "rte", 2e-5, 16, 2.0),
        ("galore-rank-8", "stsb", 3e-5, 16, 2.0),
        ("natural-galore-rank-8", "cola", 2e-5, 32, 2.0),
    ],
)
def test_published_protocols(preset, task, rate, batch, scale):
    config = preset_config(preset, task)
    assert config.model == "roberta-base"
    assert (config.method.learning_rate, config.batch_size) == (rate, batch)
    assert (config.method.scale, config.method.update_interval) == (scale, 500)
    assert config.method.targets == MethodConfig().targets
    assert config.epochs == (3 if "natural" in preset else 30)
    assert config.warmup == config.method.weight_decay == 0


def test_correlations_of_numbers_that_are_close_together():
    labels = np.array([1, 2, 3], np.float32)
    predictions = 1 + np.array([0, 0, 2**-23], np.float32)
    found = scores(("pearson", "spearman"), labels, predictions)
    assert found == pytest.approx(dict.fromkeys(found, 0.75**0.5))


def test_labels_that_a_float32_would_round_off_are_refused():
    rows = [Row("a", None, 1.7e9 + 30 * y) for y in range(4)]
    with pytest.raises(
        DataError, match=r"1e-5 of their mean, got 1.70000004e\+09 ± 33.5: subtract"
    ):
        unit_of(TASKS["own-regression"], rows)
    with pytest.raises(DataError, match=r"must differ: every training row has 1\.7e\+09"):
        unit_of(TASKS["own-regression"], rows[:1])


def test_more_classes_than_rows_of_each_are_classes_still():
    rows = [Row(f"word{i}", None, i) for i in range(30)]
    rows = Rows(tuple(map(str, range(30))), {"train": rows, "validation": rows})
    with warnings.catch_warnings(action="error"):
        found = baseline_scores(TASKS["own"], rows)
    assert found == {"validation": {"accuracy": 1.0}}


def test_many_rows_have_no_baseline(monkeypatch):
    rows = [Row("good", None, 1), Row("bad", None, 0)]
    rows = Rows(("a", "b"), {"train": rows, "validation": rows})
    assert baseline_scores(TASKS["own"], rows) == {"validation": {"accuracy": 1.0}}
    monkeypatch.setattr("examples.finetune.encoder.baseline.MOST_ROWS", 1)
    assert baseline_scores(TASKS["own"], rows) is None


@pytest.mark.parametrize("texts", [("!", 0, "", 1), ("good", 1, "fine", 1)])
def test_texts_without_words_or_of_one_label_have_no_baseline(texts):
    rows = [Row(text, None, label) for text, label in zip(texts[::2], texts[1::2], strict=True)]
    splits = {"train": rows, "validation": rows}
    assert baseline_scores(TASKS["own"], Rows(("a", "b"), splits)) is None
