"""APOLLO (Zhu et al., 2024, algorithm 1) of one matrix."""

from collections.abc import Sequence

import numpy as np

from oracles.galore import Adam


def apollo(
    W: np.ndarray,
    grads: Sequence[np.ndarray],
    projections: Sequence[np.ndarray],
    *,
    lr: float,
    granularity: str,
    scale: float = 1.0,
    limit: float | None = 1.01,
    weight_decay: float = 0.0,
    adam: Adam | None = None,
) -> np.ndarray:
    """W after each step, (steps, m, n).

    `projections` has a P (r, min(m, n)) for each step; a matrix with more rows than columns is
    turned first.
    """
    W, adam, trajectory, last = np.array(W, np.float64), adam or Adam(), [], None
    for gradient, P in zip(grads, np.asarray(projections, np.float64), strict=True):
        G = np.asarray(gradient, np.float64)
        tall = G.shape[0] > G.shape[1]
        G = G.T if tall else G
        R = P @ G
        N = adam(R)
        if granularity == "channel":
            s = np.array(
                [np.linalg.norm(N[:, j]) / np.linalg.norm(R[:, j]) for j in range(R.shape[1])]
            )
        else:
            s = np.full(R.shape[1], np.linalg.norm(N) / np.linalg.norm(R))
        U = G @ np.diag(s)
        norm = np.linalg.norm(U)
        if limit is not None and last is not None and norm > limit * last:
            U = U / norm * limit * last
        last = np.linalg.norm(U)
        U = U.T if tall else U
        W = W - lr * (scale * U + weight_decay * W)
        trajectory.append(W)
    return np.stack(trajectory)
