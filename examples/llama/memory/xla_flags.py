"""Settings of XLA that are read when jax starts."""

# XLA's CPU backend otherwise trades memory for concurrency, and copies stacks of layers inside of
# loops, which other backends do not.
MEMORY_FLAGS = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_cpu_copy_insertion_use_region_analysis=true"
)
