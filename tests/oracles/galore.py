"""GaLore (Zhao et al., 2024) of one matrix, and the pieces every variant of it needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Bases = Callable[[np.ndarray, int, str], tuple[np.ndarray, np.ndarray]]


def svd_bases(G: np.ndarray, rank: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """P (m, r) and Q (n, r) of G = U S Vᵀ; the identity stands for a side that is not projected.

    The signs are LAPACK's for G itself, which are those of JAX on a CPU.
    """
    m, n = G.shape
    left = {"short": m <= n, "long": m >= n}.get(side, side in ("left", "both"))
    right = side == "both" or not left
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    return U[:, :rank] if left else np.eye(m), Vt[:rank].T if right else np.eye(n)


@dataclass
class Adam:
    """Adam (Kingma & Ba, 2015), with each place where somebody puts an ε.

    `eps_hf` is added to √v before the bias correction, as HuggingFace's AdamW and galore-torch do;
    `eps` to the corrected √v̂, as the paper of Adam does; `eps_root` to v̂ inside the root.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    eps_hf: float = 0.0
    t: int = 0
    m: np.ndarray | float = 0.0
    v: np.ndarray | float = 0.0

    def __call__(self, g: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        c1, c2 = 1 - self.b1**self.t, 1 - self.b2**self.t
        root = np.sqrt(self.v / c2 + self.eps_root)
        return self.m / c1 / (root + self.eps_hf / np.sqrt(c2) + self.eps)


def galore(
    W: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    rank: int,
    interval: int,
    side: str,
    lr: float,
    scale: float = 1.0,
    adam: Adam | None = None,
    bases: Bases = svd_bases,
) -> np.ndarray:
    """W after each step, (steps, m, n): the moments are neither rotated nor reset at a refresh."""
    W, adam, trajectory = np.array(W, np.float64), adam or Adam(), []
    for t, G in enumerate(np.asarray(grads, np.float64)):
        if t % interval == 0:
            P, Q = bases(G, rank, side)
        R = P.T @ G @ Q
        W = W - lr * scale * P @ adam(R) @ Q.T
        trajectory.append(W)
    return np.stack(trajectory)
