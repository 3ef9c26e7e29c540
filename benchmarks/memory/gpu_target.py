"""Training steps compiled for a GPU on a machine that has none.

Needs JAX's CUDA plugin: ``pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`` in
the versions of jax. Nothing can be run; what XLA's compiler for GPUs reserves is known.
"""

import importlib.util
import os
from typing import TYPE_CHECKING

from examples.llama.memory.xla_flags import add_flags

if TYPE_CHECKING:  # jax is imported after `prepare`.
    import jax

    from examples.llama.training.build import AbstractRun

# Instead of tuning on a device, and of Triton, which is tuned: the products of cuBLAS.
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

# The device's data sheet, in the form that XLA wants.
A100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 167936
  shared_memory_per_block_optin: 166912
  threads_per_core_limit: 2048  core_count: 108  fpus_per_core: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 1555200000000  l2_cache_size: 41943040  clock_rate_ghz: 1.41
  device_memory_size: 42331013120
  cuda_compute_capability { major: 8 }
  driver_version: "13.0.0"  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"  dnn_version: "9.10.0"
  name: "NVIDIA A100-SXM4-40GB"
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10  patch: 0 }
runtime_version { major: 12  minor: 8  patch: 0 }
device_description_str: "NVIDIA A100-SXM4-40GB"
"""


def prepare() -> None:
    """Set the variables that must be in the environment before jax is imported.

    Raises:
      SystemExit: if the plugin is not installed.
    """
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise SystemExit("error: --compile-for-a100 needs jax-cuda12-plugin and jax-cuda12-pjrt")
    os.environ["JAX_PLATFORMS"] = "cpu"  # The plugin then does not look for a driver.
    add_flags(FLAGS)


def compile_for_a100(run: "AbstractRun") -> "jax.stages.Compiled":
    """The step of a run."""
    import jax
    from jax.experimental import topologies

    from examples.llama.training.build import make_step

    topology = topologies.get_topology_desc(platform="cuda", target_config=A100, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def there(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    step = make_step(run.config, run.apply, run.optimization, run.params)
    traced = jax.jit(step, donate_argnums=0).trace(there(run.state), there(run.rows))
    return traced.lower(lowering_platforms=("cuda",)).compile()
