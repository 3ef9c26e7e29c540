"""Batches and losses that go wrong, and runs that go on without them."""

import json
import shutil
import time

import faulty_run
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run as tiny
from faulty_run import batches, bigrams, rare, run_config

import natgalore_jax as ng
from examples.common.errors import CheckpointError, ConfigError
from examples.common.metrics import MetricsLog, of_kind, read_metrics
from examples.common.reporter import Reporter
from examples.common.train_state import init_state
from examples.llama import loop
from examples.llama.loop import train
from examples.llama.training.faults import FaultConfig, Guard
from examples.llama.training.optimization import make_optimization
from examples.llama.training.train_step import make_train_step

try:
    import resource
except ImportError:  # Not on Windows.
    resource = None

pytestmark = pytest.mark.usefixtures("fast_compile")

V = tiny.VOCAB

model = pytest.fixture(faulty_run.model)


def same_bits(a, b):
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("amount", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("kind", ["alone", "accumulated", "in the subspace"])
def test_a_step_without_a_finite_gradient_leaves_every_bit(kind, amount):
    """One element of one gradient; and what follows is as if the batch had not been there."""
    apply, params = bigrams(gradient=(7, amount))
    tx = ng.galore_adamw(0.1, rank=4, update_interval=2)
    accumulate = 1 if kind == "alone" else 2
    low_rank = ng.training.low_rank_steps(tx) if kind == "in the subspace" else None
    if kind == "accumulated":
        tx = optax.MultiSteps(tx, 2).gradient_transformation()
    step = make_train_step(apply, tx, accumulate, low_rank, skip_nonfinite=True)
    rng = np.random.default_rng(0)
    good = [jnp.asarray(rng.integers(8, V, (2, 9)), jnp.int32) for _ in range(5)]
    bad = good[0].at[0, 0].set(7)

    def run(batches):
        state = init_state(jax.tree.map(jnp.copy, params), tx, low_rank=low_rank)
        skipped = []
        for rows in batches:
            before = jax.tree.map(np.asarray, state)
            state, metrics = step(state, rows)
            skipped.append(bool(metrics["skipped"]))
            assert same_bits(before, state) == skipped[-1]
            assert np.isfinite(float(metrics["loss"]))
        return state, skipped

    whole, none = run(good)
    state, skipped = run([bad, *good[:3], bad, bad, *good[3:]])
    assert none == [False] * 5
    assert skipped == [True, False, False, False, True, True, False, False]
    assert same_bits(state, whole)


def test_dropped_batches_are_counted_and_logged_and_replaced(model, tmp_path):
    bad, token = rare(2)
    model(gradient=(token, jnp.nan))
    config = run_config(skip_nonfinite=True, output={"save_every": 2})
    result = train(config, splits=tiny.splits(), run_dir=tmp_path)
    assert result.finished
    records = read_metrics(tmp_path / "metrics.jsonl")
    (record,) = of_kind(records, "skipped")
    assert record == {"kind": "skipped", "step": bad + 1, "skipped": 1}
    assert [r["step"] for r in of_kind(records, "train")] == list(range(1, 9))
    assert int(result.state.micro_step) == 8


def test_without_being_asked_the_run_ends(model):
    bad, token = rare(2)
    model(loss=(token, jnp.nan))
    result = train(run_config(), splits=tiny.splits())
    assert result.diverged
    # The next step is on its way before the loss of this one is known.
    assert result.diverged_at == bad + 1 and result.steps in (bad + 1, bad + 2)


def test_too_many_dropped_in_a_row_end_the_run(monkeypatch):
    apply, params = bigrams()
    broken = {**params, "a": params["a"].at[0, 0].set(jnp.nan)}
    monkeypatch.setattr(loop, "make_model", lambda *_: (apply, broken))
    # Every batch: the norm of the gradient has all of it in it.
    config = run_config(skip_nonfinite=True, max_skips=4)
    result = train(config, splits=tiny.splits())
    assert result.diverged
    assert [r["skipped"] for r in result.records] == [1, 2, 3, 4]
    assert result.steps == 0 and result.diverged_at == 1  # No step was done: it is the first.


def trained_on(rows, config):
    """Losses of a plain run on these batches."""
    apply, params = bigrams()
    tx = make_optimization(config, params).tx
    state, losses = init_state(params, tx), []
    step = make_train_step(apply, tx)
    for batch in rows:
        state, metrics = step(state, jnp.asarray(batch))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("factor", [40.0, jnp.nan])
def test_a_spike_is_answered_with_the_last_checkpoint_and_other_data(model, tmp_path, factor):
    spike, token = rare(14)
    model(loss=(token, factor))
    config = run_config(steps=20, rollback_on_spike=3.0, output={"save_every": 4, "eval_every": 50})
    result = train(config, splits=tiny.splits(), run_dir=tmp_path)
    back = spike // 4 * 4

    rows = batches(spike + 1 + 20 - back)
    state, losses = trained_on(rows[:back] + rows[spike + 1 :], config)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in of_kind(records, "train")] == list(range(1, 21))
    np.testing.assert_allclose([r["loss"] for r in of_kind(records, "train")], losses, rtol=1e-6)
    assert same_bits(result.state.params, state.params)
    (record,) = of_kind(records, "rollback")
    assert (record["step"], record["spike"]) == (back + 1, spike + 1)
    assert record["rollbacks"] == 1
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)


@pytest.mark.parametrize("log_every", [1, 50])  # At 50 the last record is that of the rollback.
def test_a_resume_after_a_rollback_is_the_run_that_was_not_interrupted(model, tmp_path, log_every):
    """Whether it is interrupted before the spike, or between the rollback and a checkpoint."""
    spike, token = rare(14)
    model(loss=(token, 40.0))
    options = {"steps": 20, "rollback_on_spike": 3.0}
    output = {"save_every": 8, "eval_every": 50, "log_every": log_every, "resume": True}
    whole = train(
        run_config(**options, output=output), splits=tiny.splits(), run_dir=tmp_path / "a"
    )
    for seen in (9, spike - 6, 2):
        train(
            run_config(**options, output=output),
            splits=tiny.splits(),
            run_dir=tmp_path / "b",
            should_stop=tiny.after(seen),
        )
    result = train(
        run_config(**options, output=output), splits=tiny.splits(), run_dir=tmp_path / "b"
    )
    assert same_bits(result.state, whole.state)

    def known(records):
        return [{k: r[k] for k in ("kind", "step", "loss")} for r in records]

    assert known(result.records) == known(whole.records)


def test_there_is_a_limit_to_rollbacks():
    guard = Guard(FaultConfig(rollback_on_spike=2.0, max_rollbacks=1))
    guard.rolls_back(5, 9.0)
    with pytest.raises(ConfigError, match=r"jumped to 8\.5 at step 7 after 1 rollback"):
        guard.rolls_back(7, 8.5)


def test_what_is_a_spike():
    guard = Guard(FaultConfig(rollback_on_spike=2.0))
    # The first steps have high losses, and nothing to compare them with.
    assert not any(guard.is_spike(loss) for loss in [9.0, 90.0, *[3.0] * 9])
    assert guard.is_spike(6.1)
    assert not guard.is_spike(6.0)
    saved = json.loads(json.dumps(guard.to_json()))
    other = Guard(guard.config)
    other.restore(saved)
    assert other.to_json() == guard.to_json()
    assert not Guard(FaultConfig()).is_spike(jnp.inf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"per_layer": True, "faults": lambda: FaultConfig(skip_nonfinite=True)},
            "use --rollback-on-spike",
        ),
        (
            {"faults": lambda: FaultConfig(rollback_on_spike=1.0)},
            "_spike must be above 1 and .* got 1.0",
        ),
        ({"faults": lambda: FaultConfig(max_skips=0)}, "max_skips must be at least 1 and .* got 0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny.run_config(**{k: v() if callable(v) else v for k, v in changes.items()})


def test_a_rollback_needs_checkpoints():
    with pytest.raises(ConfigError, match="needs a directory of checkpoints"):
        train(run_config(rollback_on_spike=2.0), splits=tiny.splits())


@pytest.mark.skipif(resource is None, reason="the limit is one of POSIX")
def test_a_disk_without_room_ends_the_run_and_leaves_the_checkpoint_before(model, tmp_path):
    """A limit on the size of files stands for the full disk: EFBIG instead of ENOSPC."""
    model()
    # Before the disk is full, so that all is compiled and in the cache on disk.
    expected = train(run_config(), splits=tiny.splits()).state
    # Evaluations ask whether to stop too: without them it is asked once before the first step and
    # once after each.
    config = run_config(output={"save_every": 2, "eval_every": 100, "resume": True})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    counter = iter(range(99))

    def fill():
        if next(counter) == 5:
            while not (tmp_path / "checkpoints" / "4").exists():
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        return False

    try:
        with pytest.raises(CheckpointError) as error:
            train(config, splits=tiny.splits(), run_dir=tmp_path, should_stop=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in str(error.value)
    assert "micro-step 4 is complete" in str(error.value)
    assert "\n" not in str(error.value)

    result = train(config, splits=tiny.splits(), run_dir=tmp_path)
    assert result.finished
    assert same_bits(result.state, expected)


@pytest.mark.skipif(resource is None, reason="the limit is one of POSIX")
def test_a_log_without_room_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"
    try:
        with (
            pytest.raises(OSError, match=r"File too large.*metrics\.jsonl"),
            MetricsLog(path) as log,
        ):
            log.rewind(0)
            log.write(step=0)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
            log.write(step=1, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_metrics(path) == [{"step": 0}]


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(model, tmp_path, how):
    model()
    config = run_config(output={"save_every": 2, "resume": True})
    whole = train(config, splits=tiny.splits(), run_dir=tmp_path)
    files = [p for p in (tmp_path / "checkpoints" / "8" / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    raw = bytearray(largest.read_bytes())
    if how == "missing":
        largest.unlink()
    elif how == "truncated":
        largest.write_bytes(raw[: len(raw) // 2])
    else:
        raw[len(raw) // 2] ^= 1
        largest.write_bytes(raw)

    notes = []
    reporter = Reporter()
    reporter.note = notes.append
    result = train(config, splits=tiny.splits(), run_dir=tmp_path, reporter=reporter)
    assert [n for n in notes if "damaged" in n and str(largest) in n]
    assert "resuming after step 6" in notes
    assert same_bits(result.state, whole.state)
    assert [p.name for p in (tmp_path / "damaged").iterdir()] == ["8"]

    for path in (tmp_path / "checkpoints").rglob("digests.json"):
        path.write_text("{")
    with pytest.raises(ConfigError, match="every checkpoint is damaged"):
        train(config, splits=tiny.splits(), run_dir=tmp_path)


def test_a_checkpoint_of_before_there_were_faults_goes_on(model, tmp_path):
    """Without digests, counts and the options that there were not yet."""
    model()
    config = run_config(output={"save_every": 4, "resume": True})
    whole = train(config, splits=tiny.splits(), run_dir=tmp_path)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(checkpoints / "8")
    (checkpoints / "4" / "digests.json").unlink()
    data = checkpoints / "4" / "data" / "metadata"
    data.write_text(json.dumps(json.loads(data.read_text())["positions"][0]))
    saved = checkpoints / "4" / "config" / "metadata"
    old = json.loads(saved.read_text())
    del old["faults"], old["distributed"], old["data"]["skip_bad_lines"], old["offload"]
    saved.write_text(json.dumps(old))
    result = train(config, splits=tiny.splits(), run_dir=tmp_path)
    assert result.finished
    assert same_bits(result.state, whole.state)
