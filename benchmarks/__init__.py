"""Benchmarks; each program is a module: ``python -m benchmarks.optimizer.step_time``."""

import os

# Before jax is imported. OpenBLAS, which does the factorisations, has a thread pool of its own that
# spins while it waits and so takes the cores from XLA's: a factorisation then is up to a hundred
# times slower, and no two runs are alike.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
