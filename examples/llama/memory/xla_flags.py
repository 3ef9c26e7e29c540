"""Settings of XLA that are read when jax starts."""

import os

# XLA's CPU backend otherwise trades memory for concurrency, and copies stacks of layers inside of
# loops, which other backends do not.
MEMORY_FLAGS = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_cpu_copy_insertion_use_region_analysis=true"
)


def prefer_memory() -> None:
    """Add ``MEMORY_FLAGS`` to the environment, before jax is imported."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {MEMORY_FLAGS}".strip()
