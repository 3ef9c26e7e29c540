"""Several processes are one run: the same losses, one log, and each other's checkpoints."""

import shutil
import signal

import cluster_run as small
import numpy as np
import pytest
from zygote import Zygote, wait_until

from examples.common.errors import ConfigError
from examples.llama.distributed.processes import DistributedConfig

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.timeout(0)]

# The mean over a batch is summed in another order, in float32 of 24 bits; Adam divides by its
# second moments, which makes much of little differences where they are small.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def zygote(fast_compile, tmp_path_factory):
    with Zygote(tmp_path_factory.mktemp("logs")) as zygote:
        yield zygote


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


STEPS = {"steps": 6, "eval-every": 3, "save-every": 3}


@pytest.fixture(scope="module")
def finished(zygote, directory):
    """Runs by number of processes: the directory, and what the first process printed."""
    made = {}

    def run(processes):
        if processes not in made:
            name = f"of-{processes}"
            arguments = small.arguments(directory, name=name, **STEPS)
            runs = zygote.start_several(arguments, processes, slurm=processes == 2)
            assert [run.wait() for run in runs] == [0] * processes, runs[0].log()
            assert "bigram" in runs[0].log()
            for other in runs[1:]:
                assert "perplexity" not in other.log()
            made[processes] = directory / "runs" / name
        return made[processes]

    return run


def assert_same_losses(run, expected):
    ours, theirs = small.losses(run), small.losses(expected)
    assert [r[:2] for r in ours] == [r[:2] for r in theirs]
    np.testing.assert_allclose([r[2] for r in ours], [r[2] for r in theirs], rtol=TOLERANCE)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_run(finished, processes):
    """Training, validation and test losses: an evaluation is one of all processes too."""
    assert_same_losses(finished(processes), finished(1))


@pytest.mark.parametrize("sharding", ["replicated", "full"])
def test_a_run_goes_on_with_fewer_processes(finished, zygote, directory, sharding):
    """What was whole on each of four is divided over two then."""
    run = directory / "runs" / f"of-4-then-2-{sharding}"
    shutil.copytree(finished(4), run)
    shutil.rmtree(run / "checkpoints" / "6")
    options = {**STEPS, "distributed.sharding": sharding}
    arguments = small.arguments(directory, name=run.name, resume=True, **options)
    runs = zygote.start_several(arguments, 2)
    assert [run.wait() for run in runs] == [0, 0], runs[0].log()
    assert "resuming after step 3" in runs[0].log()
    assert_same_losses(run, finished(1))


def test_one_killed_ends_all_and_the_run_goes_on(zygote, directory):
    """First another process than the one that writes, then that one; then all stop by a signal."""
    run = directory / "runs" / "killed"
    for index, signals in enumerate([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]):
        arguments = small.arguments(
            directory, name=run.name, resume=True, steps=100_000, save_every=5
        )
        before = len(small.losses(run))
        runs = zygote.start_several(arguments, 2)
        wait_until(
            lambda runs=runs, before=before: (
                len(small.losses(run)) > before + 12 or any(r.code() is not None for r in runs)
            ),
            "no progress",
        )
        assert [r.code() for r in runs] == [None, None], runs[0].log() + runs[1].log()
        runs[1 - index % 2].send(signals)
        codes = [r.wait(60) for r in runs]
        if signals == signal.SIGTERM:
            assert codes == [128 + signal.SIGTERM] * 2, runs[0].log()
        else:
            assert codes[1 - index % 2] == -signal.SIGKILL
            assert codes[index % 2] != 0
    steps = [step for kind, step, _ in small.losses(run) if kind == "train"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2}, "belong together"),
        ({"cluster": True, "devices": True}, "use one of"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            "must be below .* got 2 of 2",
        ),
        ({"heartbeat_timeout": 0}, "at least 1 s"),
        ({"sharding": "full"}, "divides what is on several devices"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DistributedConfig(**options)
