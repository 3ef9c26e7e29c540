"""Alice (Gong et al., 2025, algorithms 2, 3, 4 and 10) of one matrix, m ≤ n."""

from collections.abc import Sequence

import numpy as np


def signed(U: np.ndarray) -> np.ndarray:
    """Eigenvectors whose largest entry is positive: the paper leaves signs open."""
    return np.stack([u * np.sign(u[np.argmax(np.abs(u))]) for u in U.T], axis=1)


def subspace_iteration(A: np.ndarray, M: np.ndarray) -> np.ndarray:
    """Algorithm 10 with one step."""
    U = np.linalg.qr(A @ M)[0]
    values, vectors = np.linalg.eigh(U.T @ A @ U)
    return U @ vectors[:, np.argsort(-values)]


def alice(
    W: np.ndarray,
    grads: Sequence[np.ndarray],
    chosen: Sequence[Sequence[int]],
    *,
    lr: float,
    rank: int,
    interval: int,
    leading: int,
    b1: float = 0.9,
    b2: float = 0.9,
    b3: float = 0.999,
    eps: float = 1e-8,
    alpha: float = 0.3,
    alpha_c: float = 0.4,
    gamma: float | None = 1.01,
) -> np.ndarray:
    """W after each step, (steps, m, n).

    `chosen` has for each step the vectors of the complement that a switch at this step would draw.
    """
    W, trajectory = np.array(W, np.float64), []
    m, n = W.shape
    tracked, U = np.zeros((rank, rank)), np.zeros((m, rank))
    p, phi = np.zeros(n), 0.0
    M, V = np.zeros((rank, n)), np.zeros((rank, n))
    for t, G in enumerate(np.asarray(grads, np.float64), start=1):
        if t == 1 or t % interval == 0:
            Q = b3 * U @ tracked @ U.T + (1 - b3) * G @ G.T
            if t == 1:
                values, vectors = np.linalg.eigh(Q)
                best = vectors[:, np.argsort(-values)[:rank]]
            else:
                best = subspace_iteration(Q, U)
            best = signed(best)
            complement = np.linalg.qr(best, mode="complete")[0][:, rank:]
            U = np.concatenate([best[:, :leading], complement[:, list(chosen[t - 1])]], axis=1)
        sigma = U.T @ G
        tracked = b3 * tracked + (1 - b3) * sigma @ sigma.T
        M = b1 * M + (1 - b1) * sigma
        V = b2 * V + (1 - b2) * sigma**2
        omega = M / (np.sqrt(V) + eps)

        p = b1 * p + (1 - b1) * (np.ones(m) @ G**2 - np.ones(rank) @ sigma**2)
        C = np.sqrt(m - rank) * (G - U @ U.T @ G) @ np.diag(p**-0.5)
        norm = np.linalg.norm(C)
        eta = gamma / max(norm / phi, gamma) if gamma is not None and phi > 0 else 1.0
        phi, C = eta * norm, eta * C
        W = W - lr * alpha * (U @ omega + alpha_c * C)
        trajectory.append(W)
    return np.stack(trajectory)
