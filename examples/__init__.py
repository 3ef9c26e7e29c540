"""Programs to copy and change."""

import os

# Before anything imports numpy: LAPACK's own threads fight with XLA's for the cores, and a
# factorisation on a CPU then takes up to a hundred times longer.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
