"""Signals: a line at once, a checkpoint in time, and an end at once at the second one."""

import contextlib
import signal
import subprocess
import sys
import threading

import cluster_run as small
import pytest
from command_lines import Stops
from zygote import ROOT, Zygote, wait_until

from examples.common.checkpoints import damage, kept
from examples.common.interrupt import stop_on_signals
from examples.llama.__main__ import main

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.timeout(0)]

PREEMPTION = 30.0  # Seconds that clouds leave between SIGTERM and the end of the machine.

# The main thread is in C for some seconds, as in a compilation, and runs no handler of Python's.
DEAF = """
import hashlib, sys
from examples.common.interrupt import stop_on_signals
with stop_on_signals(lambda: "right after the compilation") as stop:
    print("in C", file=sys.stderr)
    for _ in range(2):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)
        print("out of C", file=sys.stderr, flush=True)
        if stop():
            sys.exit(stop.exit_code)
"""

# Before its loop, as when a tokenizer is trained, and after it.
LOOPLESS = """
import hashlib, sys
from examples.common.interrupt import end_on_signals, stop_on_signals
end_on_signals()
{loop}
print("printed")
print("in C", file=sys.stderr)
hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000_000)
"""


@contextlib.contextmanager
def in_c(code):
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stderr.readline() == b"in C\n"
        yield program
        program.kill()


@pytest.fixture
def deaf():
    with in_c(DEAF) as program:
        yield program


@pytest.mark.parametrize("loop", ["", "with stop_on_signals(str): pass"])
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, b"interrupted\n"), (signal.SIGTERM, b"terminated\n")]
)
def test_a_program_ends_at_once_outside_of_its_loop(loop, number, said):
    with in_c(LOOPLESS.format(loop=loop)) as program:
        program.send_signal(number)
        assert program.wait(10.0) == 128 + number
        assert (program.stdout.read(), program.stderr.read()) == (b"printed\n", said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_while_the_main_thread_compiles(deaf, number):
    deaf.send_signal(number)
    said, then = deaf.stderr.readline().decode(), deaf.stderr.readline()
    assert said.startswith(f"{number.name}: saves and stops right after the compilation")
    assert then == b"out of C\n"
    assert deaf.wait() == 128 + number


def test_a_second_signal_ends_while_the_main_thread_compiles(deaf):
    deaf.send_signal(signal.SIGTERM)
    assert b"SIGTERM" in deaf.stderr.readline()
    deaf.send_signal(signal.SIGINT)
    assert deaf.wait() == 128 + signal.SIGINT
    assert b"out of C" not in deaf.stderr.read()


def test_handlers_and_threads_are_given_back():
    before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with stop_on_signals(lambda: "soon") as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop() and stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() <= threads


@pytest.fixture(scope="module")
def zygote(fast_compile, tmp_path_factory):
    with Zygote(tmp_path_factory.mktemp("logs")) as zygote:
        yield zygote


COMPILES = "compiling the training step"


@pytest.mark.parametrize("moments", [[COMPILES, COMPILES], ["step 5/", "step 10/"]])
def test_a_preempted_run_saves_in_time_and_goes_on(zygote, tmp_path, moments):
    """In the first compilation, of a new run and of one that goes on, and later."""
    run = tmp_path / "runs" / "preempted"
    options = {"name": run.name, "steps": 100_000, "save_every": 7, "eval_every": 5}
    arguments = small.arguments(tmp_path, resume=True, **options)
    for moment in moments:
        before = len(small.losses(run))
        process = zygote.start(arguments)
        wait_until(lambda p=process, m=moment: m in p.log() or p.code() is not None, "no progress")
        process.send(signal.SIGTERM)
        wait_until(lambda p=process: "SIGTERM: saves and stops" in p.log(), "no answer", 10.0)
        assert process.wait(PREEMPTION) == 128 + signal.SIGTERM, process.log()
        (*_, last) = kept(run / "checkpoints")
        assert damage(run / "checkpoints" / str(last)) is None
        trained = [step for kind, step, _ in small.losses(run) if kind == "train"]
        assert trained == list(range(1, last + 1))
        assert len(small.losses(run)) > before


def test_a_signal_after_the_last_batch_counts(tmp_path, monkeypatch, capsys):
    """The results are written when the run is resumed, which trains no further."""
    stops = Stops("test", step=2)
    monkeypatch.setattr("examples.llama.__main__.make_reporter", lambda *_: stops)
    arguments = small.arguments(tmp_path, name="late", steps=2)
    summary = tmp_path / "runs" / "late" / "summary.json"
    assert main(arguments) == 128 + signal.SIGTERM
    assert "stopped at step 2, saved" in capsys.readouterr().out and not summary.exists()
    assert main([*arguments, "--resume"]) == 0
    assert summary.exists()


def test_a_second_signal_leaves_the_last_checkpoint(zygote, tmp_path):
    run = tmp_path / "runs" / "twice"
    options = {"name": run.name, "steps": 100_000, "save_every": 2}
    process = zygote.start(small.arguments(tmp_path, **options))
    wait_until(lambda: len(kept(run / "checkpoints")) > 1 or process.code() is not None, "none")
    process.send(signal.SIGINT)
    wait_until(lambda: "SIGINT: saves and stops" in process.log(), "no answer", 10.0)
    process.send(signal.SIGINT)
    assert process.wait(PREEMPTION) == 128 + signal.SIGINT, process.log()
    assert all(
        damage(run / "checkpoints" / str(step)) is None for step in kept(run / "checkpoints")
    )
