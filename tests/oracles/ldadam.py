"""LDAdam (Robert et al., 2024) of one matrix with no more rows than columns."""

from collections.abc import Sequence

import numpy as np


def ordered_polar_factor(Y: np.ndarray) -> np.ndarray:
    """``polar(Y D)`` with weights D from 1 to 1e-4."""
    U, _, Vt = np.linalg.svd(Y * np.geomspace(1, 1e-4, Y.shape[1]), full_matrices=False)
    return U @ Vt


def ldadam(
    W: np.ndarray,
    grads: Sequence[np.ndarray],
    start: np.ndarray,
    *,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    rho: float,
    error_feedback: bool,
    first_steps: int = 8,
) -> np.ndarray:
    """W after each step, (steps, m, n), from the basis ``start``, (m, r)."""
    W = np.array(W, np.float64)
    n = W.shape[1]
    U, M, V = start, np.zeros((start.shape[1], n)), np.zeros((start.shape[1], n))
    error, trajectory = np.zeros_like(W), []
    for t, G in enumerate(np.asarray(grads, np.float64), start=1):
        a = G + error
        if t == 1:
            M_hat, V_hat, b = M, V, a
        else:
            M_hat, V_hat = M / (1 - b1 ** (t - 1)), V / (1 - b2 ** (t - 1))
            b = rho * U @ M_hat + (1 - rho) * a
        U_new = U
        for _ in range(first_steps if t == 1 else 1):
            U_new = ordered_polar_factor(b @ (b.T @ U_new))
        C = U_new.T @ U
        M_half = C @ M
        V_half = (1 - b2 ** (t - 1)) * np.abs(C**2 @ (V_hat - M_hat**2) + (C @ M_hat) ** 2)
        g = U_new.T @ a
        M_new = b1 * M_half + (1 - b1) * g
        V_new = b2 * V_half + (1 - b2) * g**2
        step = (M_new / (1 - b1**t)) / (np.sqrt(V_new / (1 - b2**t)) + eps)
        W = W - lr * U_new @ step
        if error_feedback:
            error = a - U_new @ g + b1 / (1 - b1) * (U @ M - U_new @ M_half)
        U, M, V = U_new, M_new, V_new
        trajectory.append(W)
    return np.stack(trajectory)
