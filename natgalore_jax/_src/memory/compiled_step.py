"""Memory of a compiled training step on one device."""

import dataclasses
import math
from typing import Any

import jax

from natgalore_jax._src.params.where import shape_and_dtype


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The compiler's memory analysis of one training step on one device, in bytes.

    The compiler has one block of temporaries, which gradients, activations and the update share
    over time: its split into gradients and activations is a convention. Workspaces of LAPACK or
    cuSOLVER and the rounding of allocators are not included.
    """

    argument_bytes: int  #: weights, optimizer state, batch
    result_bytes: int  #: results that do not reuse a donated argument
    gradient_bytes: int  #: temporaries: gradients that exist at the same time
    activation_bytes: int  #: all other temporaries: activations, working memory of the update
    host_bytes: int  #: arguments in host memory, not included above

    @property
    def total_bytes(self) -> int:
        """Peak memory on the device."""
        kept = self.argument_bytes + self.result_bytes
        return kept + self.gradient_bytes + self.activation_bytes

    def to_dict(self) -> dict[str, int]:
        """All fields and the total, for JSON."""
        return dataclasses.asdict(self) | {"total_bytes": self.total_bytes}


def step_memory(compiled: jax.stages.Compiled, gradients: int) -> StepMemory:
    """Memory of a compiled step with ``gradients`` bytes of gradients among its temporaries.

    Raises:
      ValueError: if the backend has no memory analysis.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("step: this backend has no memory analysis of compiled programs")
    # The compiler may reuse the memory of gradients before all of them exist.
    gradients = min(gradients, analysis.temp_size_in_bytes)
    return StepMemory(
        argument_bytes=analysis.argument_size_in_bytes,
        result_bytes=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        gradient_bytes=gradients,
        activation_bytes=analysis.temp_size_in_bytes - gradients,
        host_bytes=analysis.host_argument_size_in_bytes,
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes per device of arrays or their shapes, replicated if without a sharding."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sharding, kind = getattr(leaf, "sharding", None), shape_and_dtype(path, leaf)
        shape = kind.shape if sharding is None else sharding.shard_shape(kind.shape)
        total += math.prod(shape) * kind.dtype.itemsize
    return total
