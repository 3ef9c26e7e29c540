"""Natural GaLore as its published code runs it, of one matrix.

It differs from its paper:

* both sides are projected: a Tucker decomposition of rank (r, r), which is the truncated SVD when
  the tensor is a matrix, and the core CᵀG D (r, r) is what Adam sees;
* λ = 1e-3 whatever the size of the gradients, s = 20;
* Adam is HuggingFace's: ε = 1e-6 next to √v before the bias correction, weight decay after the
  step, on the new weight, by the learning rate.

History and moments are left in the old coordinates when the factors change. The code solves
through Woodbury's two terms; in float64 the dense matrix does as well and is shorter. Its Tucker
library gives every factor the sign that makes the largest entry positive; the signs here are
LAPACK's, unless `bases` says otherwise.
"""

from collections.abc import Sequence

import numpy as np

from oracles.galore import Adam, Bases, svd_bases


def published_natural_galore(
    W: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    rank: int,
    interval: int,
    lr: float,
    history: int = 20,
    damping: float = 1e-3,
    scale: float = 1.0,
    weight_decay: float = 0.0,
    bases: Bases = svd_bases,
) -> np.ndarray:
    """W after each step, (steps, m, n)."""
    W, adam, trajectory = np.array(W, np.float64), Adam(eps=0.0, eps_hf=1e-6), []
    recent: list[np.ndarray] = []
    for step, gradient in enumerate(np.asarray(grads, np.float64)):
        if step % interval == 0:
            U1, U2 = bases(gradient, rank, "both")
        core = U1.T @ gradient @ U2
        if len(recent) == history:
            recent.pop(0)
        recent.append(core.ravel())
        G = np.stack(recent, axis=1)
        F = damping * np.eye(core.size) + G @ G.T
        natural = np.linalg.solve(F, core.ravel()).reshape(core.shape)
        W = W - lr * scale * U1 @ adam(natural) @ U2.T
        W = W - lr * weight_decay * W
        trajectory.append(W)
    return np.stack(trajectory)
