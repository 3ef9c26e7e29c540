"""Runs of examples.llama in processes that have imported everything already.

Importing takes longer than a tiny run. `Zygote` starts one process that imports, uses no device,
and forks for each run; it has a single thread, so a fork has all that it needs.

As a program this is that process: it reads one JSON request a line and answers each in a line.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE = 300.0  # Seconds; a hundred times what it takes, for a machine with other work.


class Run:
    """One forked process, a whole run of the program."""

    def __init__(self, zygote: "Zygote", pid: int, log: Path):
        self._zygote, self.pid, self._log = zygote, pid, log
        self._code: int | None = None

    def code(self) -> int | None:
        """The exit code; minus the signal if one killed it; None while it runs."""
        if self._code is None:
            self._code = self._zygote.ask({"poll": self.pid})
        return self._code

    def wait(self, deadline: float = DEADLINE) -> int:
        wait_until(lambda: self.code() is not None, f"{self._log}: it runs on", deadline)
        assert self._code is not None
        return self._code

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def log(self) -> str:
        """Its output so far."""
        return self._log.read_text() if self._log.exists() else ""


class Zygote:
    """Forks runs of `python -m examples.llama`; a context manager that kills those left."""

    def __init__(self, directory: Path):
        self._directory, self._runs = directory, []
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict) -> int | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, arguments: Sequence[str], **environment: object) -> Run:
        log = self._directory / f"{len(self._runs)}.log"
        environment = {name: str(value) for name, value in environment.items()}
        pid = self.ask({"arguments": list(arguments), "log": str(log), "environment": environment})
        assert isinstance(pid, int)
        self._runs.append(Run(self, pid, log))
        return self._runs[-1]

    def start_several(
        self, arguments: Sequence[str], processes: int, slurm: bool = False
    ) -> list[Run]:
        """The run on so many processes, which find one another by options, or as SLURM says."""
        if processes == 1:
            return [self.start(arguments)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        if slurm:
            step = {
                "SLURM_JOB_ID": 1,
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": processes,
            }
            step["JAX_COORDINATOR_PORT"] = port
            arguments = [*arguments, "--distributed.cluster"]
            return [
                self.start(arguments, **step, SLURM_PROCID=i, SLURM_LOCALID=i)
                for i in range(processes)
            ]
        where = ["--distributed.coordinator-address", f"localhost:{port}"]
        where += ["--distributed.num-processes", str(processes), "--distributed.process-id"]
        return [self.start([*arguments, *where, str(i)]) for i in range(processes)]

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            if run.code() is None:
                run.send(signal.SIGKILL)
                run.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def wait_until(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Looks every millisecond."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(what)
        time.sleep(0.001)


def _serve() -> None:
    from examples.llama.__main__ import main

    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _become(main, request)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:  # Of a test that was cut off itself.
        os.kill(pid, signal.SIGKILL)


def _become(main: Callable[[list[str]], int], request: dict) -> None:
    for number in (0, 1, 2):
        os.close(number)
    os.open(os.devnull, os.O_RDONLY)
    os.open(request["log"], os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup(1)
    os.environ.update(request["environment"])
    sys.exit(main(request["arguments"]))


if __name__ == "__main__":
    _serve()
