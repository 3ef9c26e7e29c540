"""Reports of programs at work: lines without a terminal, and while a step compiles."""

import io
import time

import pytest
from rich.console import Console

from examples.common.reporter import COMPILING, Bar, Lines, duration, evaluating, make_reporter

SILENCE = 0.05  # Instead of a quarter of a minute.


def describe(record):
    return f"{record['kind']} loss {record['loss']}"


def record(kind, step, seconds=1.0):
    return {"kind": kind, "step": step, "loss": 2.0, "seconds": seconds}


@pytest.fixture(params=[Lines, Bar])
def reporter(request):
    terminal = request.param is Bar
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    reporter = request.param(console, describe, SILENCE)
    yield reporter
    reporter.stop()


def wait_for(reporter, text):
    deadline = time.monotonic() + 30
    while text not in printed(reporter):
        assert time.monotonic() < deadline, printed(reporter)
        time.sleep(0.01)


def printed(reporter):
    return reporter._console.file.getvalue()


def test_a_compilation_says_how_long_it_has_been(reporter):
    reporter.start(0, 10)
    with reporter.during(COMPILING):
        assert reporter.activity.stops.endswith("which cannot be interrupted")
        wait_for(reporter, "compiling the training step: ")
    assert reporter.activity.stops == "after this batch"


def test_an_evaluation_before_the_training_speaks_too(reporter):
    with reporter.during(evaluating("validation", 48)):
        wait_for(reporter, "evaluating on the validation split, 48 records: ")


def test_silence_is_broken_by_the_last_step_and_the_time_left():
    reporter = Lines(Console(file=io.StringIO()), describe, SILENCE)
    reporter.start(4, 100, "lora")
    try:
        wait_for(reporter, "lora: step 4/100\n")  # Nothing is known of its pace.
        reporter.record(record("train", 5))
        time.sleep(0.02)
        reporter.record(record("train", 6))
        wait_for(reporter, "lora: step 6/100  train loss 2.0  ")
        wait_for(reporter, " s left")
    finally:
        reporter.stop()
    said = len(printed(reporter))
    time.sleep(4 * SILENCE)
    assert len(printed(reporter)) == said


def test_time_left_is_that_of_the_pace(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    reporter = Lines(Console(file=io.StringIO(), width=200), describe)
    reporter._steps = 100
    for step, at in ((10, 100.0), (20, 200.0), (40, 400.0)):
        now[0] = at
        reporter.record(record("train", step))
    reporter.record(record("validation", 40, 7.0))
    assert printed(reporter) == (
        "step 40/100  train loss 2.0  validation loss 2.0  7 s  10 min left\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (61, "1 min"), (3599, "1 h 00 min"), (11_100, "3 h 05 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_quiet_programs_say_nothing_and_know_what_they_do(capsys):
    reporter = make_reporter(Console(), True, describe)
    with reporter.during(COMPILING):
        assert reporter.activity == COMPILING
    assert capsys.readouterr().out == ""
