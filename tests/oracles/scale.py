"""SCALE (Glentis et al., 2025, algorithm 1) of one matrix with a column for each output."""

from collections.abc import Sequence

import numpy as np


def scale(
    W: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    lr: float,
    is_last_layer: bool,
    norm: str = "l2",
    beta: float = 0.9,
    weight_decay: float = 0.0,
) -> np.ndarray:
    """W after each step, (steps, m, n)."""
    W, trajectory = np.array(W, np.float64), []
    m = np.zeros_like(W)
    for g in np.asarray(grads, np.float64):
        m = beta * m + (1 - beta) * g if is_last_layer else g
        step = np.zeros_like(W)
        for j in range(W.shape[1]):
            length = np.linalg.norm(m[:, j])
            if norm == "rms":
                length /= np.sqrt(W.shape[0])
            step[:, j] = m[:, j] / length
        W = W - lr * (step + weight_decay * W)
        trajectory.append(W)
    return np.stack(trajectory)
