"""Flags of XLA, which jax reads from the environment when it starts."""

import os

# XLA's CPU backend otherwise trades memory for concurrency, and copies stacks of layers inside of
# loops, which other backends do not.
MEMORY_FLAGS = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_cpu_copy_insertion_use_region_analysis=true"
)


def add_flags(flags: str) -> None:
    """Add flags to those of the environment; call it before jax is imported."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
