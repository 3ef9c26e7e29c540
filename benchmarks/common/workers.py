"""Runs in processes of their own, a few at a time, each on a core of its own."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields
from typing import Any, TypeVar

# XLA allocates its temporary buffers anew at each step. With glibc's defaults they go back to the
# system in between and every page of them faults again: a quarter of the time of a training step.
_KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "400000000",
}


R = TypeVar("R")


def run_all(
    todo: Sequence[R],
    workers: int,
    command: Callable[[R], list[str]],
    describe: Callable[[R, str | None], str],
) -> list[R]:
    """Makes all runs, says how each one ended, and returns those that failed.

    ``command(run)`` is the command line of a run; ``describe(run, error)`` what is said of it.
    """
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
                process = _start(command(run), workers)
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
                print(f"[{number}/{len(todo)}] {describe(run, error)}", flush=True)
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
    """The command of a program that makes one run, a dataclass of its options."""
    options = [
        text
        for field in fields(run)
        if (value := getattr(run, field.name)) != field.default
        for text in (f"--{field.name.replace('_', '-')}", str(value))
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
