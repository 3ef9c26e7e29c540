"""Every process collects the same tests in the same order, as parallel workers require."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _collected(hash_seed: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", "-q"]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_names_of_tests_depend_on_neither_hashes_nor_the_clock():
    first, second = _collected("1"), _collected("2")
    assert len(first) > 3000
    assert first == second
