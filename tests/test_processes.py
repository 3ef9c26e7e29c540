"""The arithmetic of benchmarks.distributed.processes, with measurements that are made up."""

import json

import pytest

from benchmarks.distributed import processes

SPEEDS = {1: [1.0, 100.0, 50.0], 2: [1.0, 80.0, 80.0]}  # the first step is warm-up


class Finished:
    returncode = 0

    def __init__(self, settings):
        processes = settings["processes"]
        self._result = {"tokens_per_second": SPEEDS[processes], "last_loss": 1.0, "devices": 1}

    def communicate(self):
        return f"a warning\n{json.dumps(self._result)}\n", None


def test_ratio_and_what_is_written(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(processes, "_cores", lambda count: list(range(count)))
    monkeypatch.setattr(
        processes, "_start", lambda settings, cores: started.append(cores) or Finished(settings)
    )
    results = processes.main(warm_up=1, steps=2, pairs=2, output=tmp_path / "processes.json")
    assert json.loads((tmp_path / "processes.json").read_text()) == results
    assert started == [[0, 1], [0], [1], [0], [1], [0, 1]]
    # As many tokens at 100 a second and at 50: 200 / 3 a second.
    assert results["rounds"][0]["one process"]["throughput"] == pytest.approx(200 / 3)
    assert results["median_ratio"] == pytest.approx(80 / (200 / 3))
    assert {"load_average_before", "tokens_per_second"} <= set(results["rounds"][1]["one process"])
