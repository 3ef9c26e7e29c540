"""Sweeps: runs in processes of their own, a few at a time, each on a core of its own."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.common.result_files import Json, read
from examples.common.errors import ConfigError

# XLA allocates its temporary buffers anew at each step. With glibc's defaults they go back to the
# system in between and every page of them faults again: a quarter of the time of a training step.
_KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "400000000",
}


class Planned(Protocol):
    """A run, a dataclass of its options."""

    @property
    def path(self) -> Path:
        """Its result file."""
        ...


R = TypeVar("R", bound=Planned)


def sweep(
    program: str,
    plan: Callable[[], Sequence[R]],
    is_done: Callable[[R], bool],
    outcome: Callable[[Json], str],
    *,
    workers: int,
    only_plan: bool,
    searching: bool,
    estimate: Callable[[int], str] = lambda count: "",
) -> int:
    """Make every planned run that is not done yet, and return the exit code.

    Args:
      program: module with the command ``run``, which makes one run.
      plan: the runs that are known by now.
      is_done: whether the file of a run is there; raises ConfigError if it is of another run.
      outcome: what is printed of a result.
      workers: runs at a time.
      only_plan: print what would be run, and stop.
      searching: plan again after the runs, because their results decide what is next.
      estimate: for a number of runs, how long they take.
    """
    while True:
        planned, todo, refused = plan(), [], 0
        for run in planned:
            try:
                if not is_done(run):
                    todo.append(run)
            except ConfigError as error:
                print(f"error: {error}")
                refused += 1
        done = len(planned) - len(todo) - refused
        print(f"{len(planned)} runs, {done} done{estimate(len(todo))}", flush=True)
        if only_plan:
            for run in todo:
                print(run.path)
            return 1 if refused else 0
        if run_all(todo, workers, program, outcome) or refused:
            return 1
        if not (searching and todo):
            return 0


def run_all(
    todo: Sequence[R], workers: int, program: str, outcome: Callable[[Json], str]
) -> list[R]:
    """Make all runs, print how each one ended, and return those that failed."""
    cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for core in _cores(workers):
        cores.put(core)
    started: set[subprocess.Popen] = set()
    lock, stopped = threading.Lock(), threading.Event()

    def make(run: R) -> str | None:
        """None if all went well, else what went wrong."""
        core = cores.get()
        try:
            if core is not None:
                os.sched_setaffinity(0, {core})  # Of this thread; what it starts inherits it.
            with lock:
                if stopped.is_set():
                    return "not started"
                process = _start(command(run, program), workers)
                started.add(process)
            _, errors = process.communicate()
            started.discard(process)
            last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            return last[0] if process.returncode else None
        finally:
            cores.put(core)

    failed = []
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(make, run): run for run in todo}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                run, error = futures[future], future.result()
                print(f"[{number}/{len(todo)}] {_describe(run, error, outcome)}", flush=True)
                if error is not None:
                    failed.append(run)
        except BaseException:  # A signal: what was started must not go on by itself.
            with lock:
                stopped.set()
                for process in started:
                    process.terminate()
            raise
    if failed:
        print(f"{len(failed)} of {len(todo)} runs failed", flush=True)
    return failed


def command(run: Any, program: str) -> list[str]:
    """The command of a program that makes one run."""
    options = [
        text
        for field in fields(run)
        if (value := getattr(run, field.name)) != field.default
        for text in (
            f"--{field.name.replace('_', '-')}",
            *(map(str, value) if isinstance(value, tuple) else (str(value),)),
        )
    ]
    return [sys.executable, "-m", program, "run", *options]


def environment(workers: int) -> dict[str, str]:
    """Environment of a run. What the user has set stays."""
    own = {"OPENBLAS_NUM_THREADS": "1", **_KEEP_MEMORY}
    if workers > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        own["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
        return own | {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return own | dict(os.environ)


def _start(command: list[str], workers: int) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=environment(workers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _cores(workers: int) -> Iterable[int | None]:
    if workers == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * workers
    usable = sorted(os.sched_getaffinity(0))
    return [usable[i % len(usable)] for i in range(workers)]


def _describe(run: Planned, error: str | None, outcome: Callable[[Json], str]) -> str:
    what = f"{run.path.parent.name} {run.path.stem}"
    if error is not None:
        return f"{what}: FAILED: {error}"
    record = read(run.path)
    return f"{what}: {outcome(record)}, {record['wall_seconds']:.0f} s"
