"""RACS (Gong et al., 2025, equation 16 and algorithm 1) of one matrix."""

from collections.abc import Sequence

import numpy as np


def fixed_point(G: np.ndarray, steps: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Diag(S) and Diag(Q) of a G with no more rows than columns, from dense diagonal matrices."""
    m, _ = G.shape
    Q = np.eye(m)
    for _ in range(steps):
        S = np.diag(np.diag(G.T @ Q @ G)) / np.linalg.norm(Q) ** 2
        Q = np.diag(np.diag(G @ S @ G.T)) / np.linalg.norm(S) ** 2
    return np.diag(S), np.diag(Q)


def racs(
    W: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    lr: float,
    beta: float = 0.9,
    alpha: float = 0.05,
    gamma: float | None = 1.01,
    steps: int = 5,
    weight_decay: float = 0.0,
) -> np.ndarray:
    """W after each step, (steps, m, n); a matrix with more rows than columns is turned first."""
    W, trajectory = np.array(W, np.float64), []
    if W.shape[0] > W.shape[1]:
        turned = np.swapaxes(np.asarray(grads), 1, 2)
        settings = {"lr": lr, "beta": beta, "alpha": alpha, "gamma": gamma}
        result = racs(W.T, turned, **settings, steps=steps, weight_decay=weight_decay)
        return np.swapaxes(result, 1, 2)
    s, q, phi = 0.0, 0.0, 0.0
    for t, G in enumerate(np.asarray(grads, np.float64), start=1):
        S, Q = fixed_point(G, steps)
        s = beta * s + (1 - beta) * S
        q = beta * q + (1 - beta) * Q
        scaled = np.diag(q**-0.5) @ G @ np.diag(s**-0.5)
        norm = np.linalg.norm(scaled)
        eta = gamma / max(norm / phi, gamma) if gamma is not None and t > 1 else 1.0
        phi = eta * norm
        W = W - lr * (eta * alpha * scaled + weight_decay * W)
        trajectory.append(W)
    return np.stack(trajectory)
