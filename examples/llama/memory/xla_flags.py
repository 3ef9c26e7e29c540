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


def simulate_devices(number: int) -> None:
    """Let a CPU count as several devices; call it before jax is imported."""
    add_flags(f"--xla_force_host_platform_device_count={number}")
    os.environ.setdefault("NPROC", "32")  # They wait for one another in the threads of one pool.
