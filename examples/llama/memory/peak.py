"""Memory of a run: of a step as compiled, and the observed peak."""

import sys
from typing import Any, NamedTuple

import jax

from examples.llama.memory.sizes import format_bytes
from examples.llama.memory.step_memory import StepMemory

try:
    import resource
except ImportError:  # Not on Windows.
    resource = None


class Peak(NamedTuple):
    """The most memory that was in use."""

    device: int | None  # bytes, by the device's allocator; None where it does not count, as on CPUs
    step: int | None  # bytes of a step, by the compiler; None if none was compiled
    process: int | None  # bytes of the whole process, by the operating system


class RunMemory(NamedTuple):
    """A run's memory: what a step was said to take, and what was seen at the end."""

    predicted: StepMemory | None  # None if no step was run, or the backend gives no account
    peak: Peak

    def to_dict(self) -> dict[str, Any]:
        predicted = None if self.predicted is None else self.predicted.to_dict()
        return {"predicted": predicted, "peak": self.peak._asdict()}


def observed_peak(predicted: StepMemory | None) -> Peak:
    """At this moment, since the process began."""
    stats = jax.local_devices()[0].memory_stats() or {}
    step = None if predicted is None else predicted.total
    return Peak(stats.get("peak_bytes_in_use"), step, _process_peak())


def describe(memory: StepMemory) -> str:
    """One line with all parts."""
    sizes = {"Fisher" if k == "history" else k: size for k, size in memory.parts.items()}
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    return f"memory of a step: {format_bytes(memory.total)} ({parts})"


def peak_rows(memory: dict[str, Any]) -> list[tuple[str, int]]:
    """Labels and bytes for the summary, of what is known."""
    labels = {
        "device": "peak memory of the device",
        "step": "memory of a step, as compiled",
        "process": "peak memory of the process",
    }
    peak = memory["peak"]
    return [(label, peak[key]) for key, label in labels.items() if peak[key] is not None]


def _process_peak() -> int | None:
    if resource is None:
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size  # Elsewhere it is in KiB.
