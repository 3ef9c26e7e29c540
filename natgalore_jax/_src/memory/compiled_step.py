"""Memory of a compiled training step on one device."""

import dataclasses
import math
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The compiler's account of one training step on one of its devices, in bytes.

    Arguments, results and temporaries are facts. The compiler lays the temporaries, in which
    gradients, activations and the update follow one another, into one block: how it is divided is
    a convention. Workspaces of LAPACK or cuSOLVER and what an allocator rounds up are in neither.
    """

    argument_bytes: int  #: weights, optimizer state, batch
    result_bytes: int  #: that do not take the place of a donated argument
    gradient_bytes: int  #: of those that exist at the same time, of the temporaries
    activation_bytes: int  #: all other temporaries: activations, working memory of the update
    host_bytes: int  #: arguments in the memory of the host, in none of the others

    @property
    def total_bytes(self) -> int:
        """At the peak, on the device."""
        kept = self.argument_bytes + self.result_bytes
        return kept + self.gradient_bytes + self.activation_bytes

    def to_dict(self) -> dict[str, int]:
        """All of it, ready for JSON."""
        return dataclasses.asdict(self) | {"total_bytes": self.total_bytes}


def step_memory(compiled: jax.stages.Compiled, gradients: int) -> StepMemory:
    """The account of a compiled step, of whose temporaries ``gradients`` bytes are gradients.

    Raises:
      ValueError: if the backend gives none.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("step: this backend gives no account of the memory of compiled programs")
    # The compiler may use the room of gradients again before it has all of them.
    gradients = min(gradients, analysis.temp_size_in_bytes)
    return StepMemory(
        argument_bytes=analysis.argument_size_in_bytes,
        result_bytes=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        gradient_bytes=gradients,
        activation_bytes=analysis.temp_size_in_bytes - gradients,
        host_bytes=analysis.host_argument_size_in_bytes,
    )


def bytes_per_device(tree: Any) -> int:
    """Of arrays or their shapes; those without a sharding are whole on every device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total
