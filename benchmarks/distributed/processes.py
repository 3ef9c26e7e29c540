"""The throughput of several processes beside that of one, on the same cores.

``python -m benchmarks.distributed.processes`` trains a LLaMA preset with the program of
examples/llama on random tokens: in one process that has all cores, and in one process for each
core, which share every batch and sum their gradients through the loopback network. The two take
turns, and start in turns. Each run is of new processes; their first steps, with all refreshes of
the start, are not counted.
"""

import os
import socket
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import child
from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, write_results
from examples.llama.model.config import PresetName

_ROOT = Path(__file__).parents[2]


def main(
    preset: PresetName = "nano",
    batch_size: int = 16,
    seq_len: int = 128,
    warm_up: int = 5,
    steps: int = 25,
    pairs: int = 3,
    processes: int = 2,
    output: Path = RESULTS / "processes.json",
) -> dict[str, Any]:
    """Time one process and several on the same cores.

    Args:
      preset: the model.
      batch_size: rows of a step, on all processes together.
      seq_len: tokens in a row.
      warm_up: steps at the start of each run that are not counted.
      steps: steps that are.
      pairs: runs of each of the two.
      processes: how many of them have a core each; the one process has as many cores.
      output: where the results go.
    """
    cores = _cores(processes)
    work = {
        "preset": preset,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "steps": warm_up + steps,
    }
    pair = {"one process": [cores], "several processes": [[core] for core in cores]}
    rounds: list[dict[str, Any]] = []
    for number in range(pairs):
        order = list(pair) if number % 2 == 0 else list(reversed(pair))
        timed = {name: _run(work, pair[name], warm_up) for name in order}
        one, several = (timed[name]["throughput"] for name in pair)
        rounds.append({"order": order, **timed, "ratio": several / one})
        print(f"{one:8.0f} tokens/s of one process, {several:8.0f} of {processes}")
    ratios = [r["ratio"] for r in rounds]
    results = {
        "environment": environment(seed=0),
        "settings": {**work, "warm_up": warm_up, "processes": processes, "cores": cores},
        "rounds": rounds,
        "median_ratio": median(ratios),
        "ratios": [min(ratios), max(ratios)],
    }
    print(f"ratio {median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    write_results(results, output)
    return results


def _cores(count: int) -> list[int]:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < count:
        raise SystemExit(f"{count} processes need a core each, and {len(usable)} may be used here")
    return usable[:count]


def _run(work: dict[str, Any], cores: list[list[int]], warm_up: int) -> dict[str, Any]:
    """One run, of a process for each list of cores: what the first of them has measured."""
    load = os.getloadavg()[0]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    work = work | {"processes": len(cores), "address": address}
    measured, *_ = child.results(
        *(_start(work | {"process": i}, own) for i, own in enumerate(cores))
    )
    samples = measured["tokens_per_second"][warm_up:]
    # Tokens over seconds of all steps: the harmonic mean.
    throughput = len(samples) / sum(1 / x for x in samples)
    return {"throughput": throughput, "load_average_before": load, **measured}


def _start(settings: dict[str, Any], cores: list[int]) -> subprocess.Popen[str]:
    """A process that has these cores only; XLA makes as many threads as it finds cores."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
    environment |= {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)}
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # Inherited by what is started.
    try:
        return child.start("benchmarks.distributed.process_run:run", env=environment, **settings)
    finally:
        os.sched_setaffinity(0, ours)


if __name__ == "__main__":
    run_from_command_line(main)
