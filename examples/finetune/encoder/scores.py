"""The metrics of GLUE, from the predictions of a whole split."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats
import sklearn.metrics


def _correlation(of: Callable) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        # Of a constant there is none; a model that gives one has learned nothing.
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        # In float32 the mean of numbers that are close together takes the digits of their spread.
        return of(labels.astype(np.float64), predictions.astype(np.float64)).statistic

    return score


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "accuracy": sklearn.metrics.accuracy_score,
    # Of class 1, the paraphrases.
    "f1": lambda labels, predictions: sklearn.metrics.f1_score(
        labels, predictions, zero_division=0
    ),
    "matthews": sklearn.metrics.matthews_corrcoef,
    "pearson": _correlation(scipy.stats.pearsonr),
    "spearman": _correlation(scipy.stats.spearmanr),
}


def scores(
    metrics: tuple[str, ...], labels: np.ndarray, predictions: np.ndarray
) -> dict[str, float]:
    """Each metric of predicted classes, or of predicted numbers for correlations."""
    return {name: float(METRICS[name](labels, predictions)) for name in metrics}
