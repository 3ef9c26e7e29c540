"""Parts of several tests of command lines."""

import signal

from examples.common.reporter import Reporter


class Stops(Reporter):
    """A reporter that ends the run at a step, by a signal, when it has such a record."""

    def __init__(self, kind="train", step=3):
        self.kind, self.step = kind, step

    def record(self, record):
        if record["kind"] == self.kind and record["step"] == self.step:
            signal.raise_signal(signal.SIGTERM)


def assert_one_line(capsys, message):
    """The error is one line, after warnings about the data at most."""
    captured = capsys.readouterr()
    *warnings, error = captured.err.splitlines()
    assert error.startswith("error: ") and message in error
    assert all(line.startswith("warning: the run reads its") for line in warnings)
    assert captured.out == ""
