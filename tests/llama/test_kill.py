"""A run that is killed at any moment, again and again, is the run that was not.

``HYPOTHESIS_PROFILE=long`` kills it 20 times, otherwise 4 times; every second time while it saves.
"""

import os
import random
import signal

import cluster_run as small
import pytest
from zygote import Zygote, wait_until

pytestmark = [pytest.mark.usefixtures("fast_compile"), pytest.mark.timeout(0)]

KILLS = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 4


def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path):
    """One run, killed and resumed: each resume stands on all the ones before it."""
    options = {"steps": 100_000, "save_every": 3, "eval_every": 7}
    run = tmp_path / "runs" / "killed"
    rng = random.Random(0)
    while_saving = 0

    def unfinished():
        return list((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    with Zygote(tmp_path) as zygote:
        killed = small.arguments(tmp_path, name=run.name, resume=True, **options)
        for kill in range(KILLS + 1):
            before = len(small.losses(run))
            process = zygote.start(killed)
            more = rng.randrange(1, 25)
            # Counted from what it finds: records after its checkpoint are dropped first.
            wait_until(
                lambda p=process, n=before + more: (
                    len(small.losses(run)) > n or p.code() is not None
                ),
                "no progress",
            )
            assert process.code() is None, process.log()
            if kill == KILLS:
                process.send(signal.SIGTERM)
                assert process.wait() == 128 + signal.SIGTERM
                break
            if kill % 2:
                wait_until(unfinished, "it saves no more")
            process.send(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            while_saving += bool(unfinished())

        ours = small.losses(run)
        whole = tmp_path / "runs" / "whole"
        process = zygote.start(small.arguments(tmp_path, name=whole.name, **options))
        wait_until(lambda: len(small.losses(whole)) >= len(ours), "no progress")
        process.send(signal.SIGTERM)
        process.wait()

    # Between seeing a save and killing it, the save may have been completed.
    assert while_saving >= KILLS // 4
    assert len(ours) > 5 * KILLS
    assert ours == small.losses(whole)[: len(ours)]
