"""Environment of a measurement, and the file of its result."""

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.common.result_files import write

RESULTS = Path(__file__).parents[1] / "results"

_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "natgalore-jax")
_THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NPROC", "XLA_FLAGS")


def environment(seed: int) -> dict[str, Any]:
    """Everything that influences a measurement, as JSON values."""
    device = jax.devices()[0]
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": {"platform": device.platform, "kind": device.device_kind},
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": {name: os.environ.get(name) for name in _THREAD_SETTINGS},
        # Other programs on the machine: far above zero, the times are too long.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def write_results(results: dict[str, Any], path: Path) -> None:
    write(results, path, allow_nan=True)
    print(f"\nwritten to {path.name}")


def target(name: str, value: float, limit: float, at_most: bool = True) -> dict[str, Any]:
    """One line of a list of targets, met or missed."""
    met = value <= limit if at_most else value >= limit
    return {"name": name, "value": value, "limit": limit, "at_most": at_most, "met": bool(met)}


def print_targets(targets: list[dict[str, Any]]) -> None:
    print("\nTargets")
    for t in targets:
        sign = "<=" if t["at_most"] else ">="
        verdict = "met" if t["met"] else "MISSED"
        print(f"  {verdict:7}{t['name']}: {t['value']:.4g} {sign} {t['limit']:.4g}")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
