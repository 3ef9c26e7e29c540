"""Settings that must be in the environment before jax starts."""

import os

# XLA's CPU thread pool is as large as the machine; on two cores, several simulated devices that
# wait for each other inside batched linear algebra starve it and hang. NPROC enlarges the pool.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
