"""Analytic lower bound of an update: bytes that must move, operations that must be done.

Counted for one float32 matrix with sides a ≤ b, k = ab, at rank r; what is read twice in practice
counts once, and scalars, Gram matrices and refreshes not at all.

=================  =========================================================  =====================
method             numbers that must move                                     operations
=================  =========================================================  =====================
adamw              read G, W, m, v, write m, v, U: 7k                         none
galore             read G, W, write U: 3k; read P: ar; read and write m, v    4kr: R = PᵀG, U = PN
                   in the subspace: 4rb
natural            the same; with a history, s columns of it read, one        4kr
                   written: (s + 1) rb
contrib            read G, W, write U: 3k; read P: br; read and write m, v:   4kr
                   4ra (it projects the longer side)
=================  =========================================================  =====================

W is read because of weight decay, which all have here (none is the default of contrib). The
operations of Adam and of the natural gradient are done while the bytes move.
"""

from collections.abc import Iterable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common.timing import seconds

# Published bandwidth of the memory, bytes/s, and rate of products of float32 in the precision that
# is native there (TF32, and one pass of bfloat16), operations/s: NVIDIA's data sheet of the H100
# SXM, without sparsity, and Google Cloud's page of the TPU v5e.
ACCELERATORS = {"H100": (3.35e12, 494.7e12), "TPU v5e": (0.819e12, 197e12)}

_ITEM = 4  # bytes of a float32
METHODS = ("adamw", "contrib", "galore", "natural")


def bytes_moved(
    method: str, matrices: Iterable[tuple[int, int]], rank: int, history: int = 0
) -> int:
    """Bytes that one update without a refresh must read and write."""
    total = 0
    for m, n in matrices:
        k, a, b = m * n, min(m, n), max(m, n)
        r = min(rank, a)
        total += {
            "adamw": 7 * k,
            "galore": 3 * k + a * r + 4 * r * b,
            "natural": 3 * k + a * r + 4 * r * b + (history + 1) * r * b * (history > 0),
            "contrib": 3 * k + b * r + 4 * r * a,
        }[method]
    return _ITEM * total


def operations(method: str, matrices: Iterable[tuple[int, int]], rank: int) -> int:
    """Floating-point operations of the projection and the way back."""
    if method == "adamw":
        return 0
    return sum(4 * m * n * min(rank, m, n) for m, n in matrices)


def floor_seconds(n_bytes: int, n_operations: int, bandwidth: float, rate: float) -> float:
    """Seconds, from bytes, bytes/s, operations and operations/s: first one, then the other."""
    return n_bytes / bandwidth + n_operations / rate


def accelerator_bounds(n_bytes: int, n_operations: int) -> dict[str, float]:
    """Seconds that an update takes at least on each accelerator, products overlapping memory."""
    return {
        name: max(n_bytes / bandwidth, n_operations / rate)
        for name, (bandwidth, rate) in ACCELERATORS.items()
    }


class Machine:
    """Samples of what the machine can do, taken in between the steps of the optimizers.

    * copy: x + 1 for a vector far larger than the caches, into memory that is there already.
    * fresh_copy: the same into new memory, as JAX allocates it. The system hands out such large
      pieces page by page and fills them with zeros, so that it is several times slower. An update
      does write its U into new memory, though in pieces that the allocator reuses.
    * products: PᵀG and PN, or GQ and NQᵀ, of every distinct shape at the rank in question, the
      operands in the caches if they fit.
    """

    def __init__(self, matrices: Iterable[tuple[int, int]], rank: int, copy_mib: int = 256):
        self._x = jnp.ones(copy_mib * 2**20 // _ITEM, jnp.float32)
        self._target = jnp.zeros_like(self._x)
        self._fresh = jax.jit(lambda x: x + 1.0).lower(self._x).compile()
        self._reused = (
            jax.jit(lambda x, target: x + 1.0, donate_argnums=1, keep_unused=True)
            .lower(self._x, self._target)
            .compile()
        )
        self._products = [p for m, n in sorted(set(matrices)) for p in _products(m, n, rank)]
        self.samples: dict[str, list[float]] = {"copy": [], "fresh_copy": []}
        self._operations: dict[str, int] = {}
        for name, count, _, _ in self._products:
            self.samples[name], self._operations[name] = [], count
        # Nothing that only a first call does is to be in the samples.
        self.sample()
        for taken in self.samples.values():
            taken.clear()

    def sample(self) -> None:
        def copy():
            self._target = self._reused(self._x, self._target)
            return self._target

        self.samples["copy"].append(seconds(copy))
        self.samples["fresh_copy"].append(seconds(self._fresh, self._x))
        for name, _, product, operands in self._products:
            self.samples[name].append(seconds(product, *operands))

    def figures(self) -> dict[str, Any]:
        """Medians, in bytes/s read plus written, and in operations/s."""
        moved = 2 * self._x.nbytes
        rates = {
            name: count / median(self.samples[name]) for name, count in self._operations.items()
        }
        return {
            "copy_bytes_per_s": moved / median(self.samples["copy"]),
            "fresh_copy_bytes_per_s": moved / median(self.samples["fresh_copy"]),
            "product_operations_per_s": median(list(rates.values())),
            "product_operations_per_s_of_shape": rates,
            "copy_mib": self._x.nbytes / 2**20,
            "samples_s": self.samples,
        }


def _products(m: int, n: int, rank: int):
    """(name, operations, compiled product, operands) of both products of one shape."""
    a, b = min(m, n), max(m, n)
    r = min(rank, a)
    key = jax.random.key(0)
    G, P, N = (jax.random.normal(key, shape) for shape in ((m, n), (a, r), (r, b)))
    if m <= n:
        pairs = [
            (f"PᵀG {m}x{n}", lambda P, G: P.T @ G, (P, G)),
            (f"PN {m}x{n}", jnp.matmul, (P, N)),
        ]
    else:
        pairs = [
            (f"GQ {m}x{n}", jnp.matmul, (G, P)),
            (f"NQᵀ {m}x{n}", lambda N, Q: N @ Q.T, (N.T, P)),
        ]
    for name, product, operands in pairs:
        yield name, 2 * m * n * r, jax.jit(product).lower(*operands).compile(), operands
