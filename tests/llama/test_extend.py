"""Settings that differ when a run is resumed: those that may, and those that may not."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_run as tiny
from tiny_run import assert_same_bits

from examples.common.checkpoints import kept, steps_done
from examples.common.errors import ConfigError
from examples.common.metrics import of_kind, read_metrics
from examples.common.optimizers import OptimizerConfig
from examples.common.schedule import ScheduleConfig
from examples.llama.data import DataConfig
from examples.llama.loop import train
from examples.llama.model.adapters import AdapterConfig
from examples.llama.run_config import adjustments, differences

pytestmark = pytest.mark.usefixtures("fast_compile")

CONSTANT = ScheduleConfig(warmup=0.0, floor=1.0)
ADAMW = OptimizerConfig(name="adamw", learning_rate=0.01)
RELORA = AdapterConfig(kind="relora", rank=2, merge_every=2, restart_warmup=1)


def config(steps, *, resume=False, **changes):
    output = {"eval_every": 3, "save_every": 2, "resume": resume}
    changes = {"optimizer": ADAMW, "schedule": CONSTANT, **changes}
    return tiny.run_config(steps=steps, output=output, **changes)


def run(config, path=None, **more):
    return train(config, splits=tiny.splits(), run_dir=path, **more)


@pytest.mark.parametrize("changes", [{}, {"adapter": RELORA}])
def test_an_extended_run_is_the_longer_run(tmp_path, changes):
    """At a constant rate, bit for bit. The merge that the end of the first run left out is done."""
    notes = tiny.Notes()
    assert run(config(4, resume=True, **changes), tmp_path, reporter=notes).finished
    assert f"{tmp_path} has no checkpoint yet: starting at the first step" in notes.notes
    longer = run(config(7, resume=True, **changes), tmp_path, reporter=notes)
    assert longer.finished and longer.steps == 7
    assert "resuming after step 4, steps: 4 -> 7" in notes.notes
    whole = run(config(7, **changes))
    tiny.assert_same_bits(longer.state, whole.state)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in of_kind(records, "train")] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["step"] for r in of_kind(records, "test")] == [4, 7]


def test_another_rate_and_schedule(tmp_path):
    """The steps to come have the rates that a run of this configuration has from the start."""
    run(config(6), tmp_path, should_stop=tiny.after(3))
    changes = {
        "optimizer": dataclasses.replace(ADAMW, learning_rate=0.5),
        "schedule": ScheduleConfig(warmup=0.0, floor=0.2),
    }
    notes = tiny.Notes()
    result = run(config(6, resume=True, **changes), tmp_path, reporter=notes)
    assert (
        "resuming after step 3, optimizer.learning_rate: 0.01 -> 0.5, schedule.floor: 1.0 -> 0.2"
        in notes.notes
    )
    rates = [r["learning_rate"] for r in of_kind(result.records, "train")]
    fresh = run(config(6, **changes))
    expected = [r["learning_rate"] for r in of_kind(fresh.records, "train")]
    np.testing.assert_allclose(rates, [0.01] * 3 + expected[3:], rtol=1e-6)
    assert max(rates[3:]) > 0.1


@pytest.mark.parametrize(
    ("before", "now"),
    [((2, 4), (4, 2)), ((4, 2), (2, 4))],
    ids=["larger batches", "smaller batches"],
)
def test_batches_of_the_same_rows(tmp_path, before, now):
    """(rows, batches) of a step. The same rows make the same steps, to the rounding of Adam's
    first steps, which divide by small roots: a fifth of one update of 0.01."""
    (rows, batches), (new_rows, new_batches) = before, now
    run(config(4, batch_size=rows, accumulate=batches), tmp_path)
    other = config(7, resume=True, batch_size=new_rows, accumulate=new_batches)
    # Twice: the checkpoint that is resumed first is still of the old batches.
    part = run(other, tmp_path, should_stop=tiny.after(1))
    assert (part.steps, part.finished) == (4, False)
    result = run(other, tmp_path)
    assert result.finished and result.steps == 7
    names = kept(tmp_path / "checkpoints")
    assert names[-1] == 7 * new_batches
    assert steps_done(tmp_path / "checkpoints")[names[-1]] == (7, 0)
    whole = run(config(7, batch_size=new_rows, accumulate=new_batches))
    steps, expected = (of_kind(x.records, "train") for x in (result, whole))
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6, 7]
    for a, b in zip(steps, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)


@pytest.mark.parametrize("steps", [8, 3])
def test_a_start_that_saves_nothing_changes_nothing(tmp_path, steps):
    """With other batches of the same rows, stopped before its first step or refused."""
    checkpoints, whole = tmp_path / "checkpoints", config(8, batch_size=4, accumulate=2)
    run(config(4, batch_size=4, accumulate=2), tmp_path)
    other = config(steps, resume=True, batch_size=2, accumulate=4)
    if steps == 8:
        assert not run(other, tmp_path, should_stop=tiny.after(0)).finished
    else:
        with pytest.raises(ConfigError, match="has done 4 steps, got steps=3"):
            run(other, tmp_path)
        assert steps_done(checkpoints) == {4: (2, 0), 8: (4, 0)}
    notes = tiny.Notes()
    again = dataclasses.replace(whole, output=dataclasses.replace(whole.output, resume=True))
    result = run(again, tmp_path, reporter=notes)
    assert any(note.startswith("resuming after step 4") for note in notes.notes)
    assert steps_done(checkpoints)[kept(checkpoints)[-1]] == (8, 0)
    assert_same_bits(result.params, run(whole).params)


def test_an_unfinished_step_has_to_be_completed(tmp_path):
    run(config(4, batch_size=2, accumulate=4), tmp_path, should_stop=tiny.after(6))
    other = config(4, resume=True, batch_size=4, accumulate=2)
    with pytest.raises(ConfigError, match="--accumulate 4 --batch-size 2 --steps 2 before"):
        run(other, tmp_path)
    run(config(2, resume=True, batch_size=2, accumulate=4), tmp_path)
    assert run(other, tmp_path).finished


def test_the_same_text_elsewhere():
    """Its content is compared; of a stream only the beginning is known."""
    old = config(3).to_dict() | {"text": "one"}
    data = {"data": ["elsewhere"], "tokenizer": "mine.json"}
    new = old | {"data": old["data"] | data}
    assert differences(old, new) == []
    assert len(adjustments(old, new)) == 2
    assert [text.split(":")[0] for text in differences(old, new | {"text": "two"})] == [
        "data.data",
        "data.tokenizer",
        "text",
    ]
    stream = new | {"data": old["data"] | {"data": ["hf:owner/name"]}}
    assert [text.split(":")[0] for text in differences(old, stream)] == ["data.data"]


def test_a_finished_run_takes_no_other_rate(tmp_path):
    """No step would be trained with it, but the files of the run would say so."""
    run(config(4), tmp_path)
    before = (tmp_path / "config.json").read_text()
    change = {"optimizer": dataclasses.replace(ADAMW, learning_rate=0.9)}
    with pytest.raises(ConfigError, match=r"all 4 steps, and none is left.*learning_rate"):
        run(config(4, resume=True, **change), tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_fewer_steps_than_are_done(tmp_path):
    run(config(4), tmp_path)
    with pytest.raises(ConfigError, match="has done 4 steps, got steps=3"):
        run(config(3, resume=True), tmp_path)


def test_documents_are_not_divided_otherwise():
    """A batch of short documents has fewer tokens, which weigh more in the mean of a step."""
    documents = DataConfig(rows="documents")
    old = config(4, batch_size=4, accumulate=4, data=documents)
    new = dataclasses.replace(old, batch_size=8, accumulate=2).to_dict()
    assert differences(old.to_dict(), new) == ["accumulate: 4 -> 2", "batch_size: 4 -> 8"]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"steps": 9, "schedule": ScheduleConfig(floor=0.5)}, []),
        ({"batch_size": 8, "accumulate": 2}, []),
        ({"batch_size": 16, "accumulate": 1}, ["accumulate: 4 -> 1", "batch_size: 4 -> 16"]),
        ({"batch_size": 4, "accumulate": 2}, ["accumulate: 4 -> 2"]),
        ({"accumulate_in_subspace": True}, ["accumulate_in_subspace: False -> True"]),
        ({"seq_len": 4}, ["seq_len: 8 -> 4"]),
        ({"seed": 1, "steps": 9}, ["seed: 0 -> 1"]),
        ({"model": dataclasses.replace(tiny.MODEL, layers=3)}, ["model.layers: 2 -> 3"]),
        (
            {"optimizer": dataclasses.replace(ADAMW, weight_decay=0.1, learning_rate=1.0, rank=8)},
            ["optimizer.rank: 64 -> 8", "optimizer.weight_decay: 0.0 -> 0.1"],
        ),
    ],
)
def test_differences_that_are_refused(changes, refused):
    old = config(4, batch_size=4, accumulate=4)
    new = dataclasses.replace(old, **changes).to_dict()
    assert differences(old.to_dict(), new) == refused
    assert bool(adjustments(old.to_dict(), new)) == (
        not refused or bool({"steps", "optimizer"} & changes.keys())
    )
