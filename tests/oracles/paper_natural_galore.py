"""Natural GaLore as its paper writes it (sections 2.2 and 2.4), of one matrix.

The empirical Fisher matrix of the last s low-rank gradients, the newest included, summed and not
averaged, with an absolute damping: F = λI + Σ g gᵀ. One side is projected. The paper says nothing
about the stored gradients when P changes, and writes them without coordinates: they stay as they
are. It gives no λ, and s = 10 in its first version.
"""

from collections.abc import Sequence

import numpy as np

from oracles.galore import Adam, svd_bases


def paper_natural_galore(
    W: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    rank: int,
    interval: int,
    lr: float,
    side: str = "short",
    history: int = 10,
    damping: float = 1e-3,
    scale: float = 1.0,
    adam: Adam | None = None,
) -> np.ndarray:
    """W after each step, (steps, m, n)."""
    W, adam, trajectory = np.array(W, np.float64), adam or Adam(), []
    recent: list[np.ndarray] = []
    for k, gradient in enumerate(np.asarray(grads, np.float64)):
        if k % interval == 0:
            P, Q = svd_bases(gradient, rank, side)
        g = P.T @ gradient @ Q
        recent = [*recent, g.ravel()][-history:]
        G = np.stack(recent, axis=1)
        F = damping * np.eye(g.size) + G @ G.T
        natural = np.linalg.solve(F, g.ravel()).reshape(g.shape)
        W = W - lr * scale * P @ adam(natural) @ Q.T
        trajectory.append(W)
    return np.stack(trajectory)
