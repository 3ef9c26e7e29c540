"""A run that is interrupted and resumed is the run that was not, bit for bit."""

import dataclasses

import pytest
import tiny_run as tiny

from examples.common.errors import ConfigError
from examples.common.metrics import read_metrics
from examples.common.optimizers import OptimizerConfig
from examples.llama.data import DataConfig
from examples.llama.loop import train

pytestmark = pytest.mark.usefixtures("fast_compile")

TIMES = {"seconds", "tokens_per_second"}


def untimed(records):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def resumed(config):
    return dataclasses.replace(config, output=dataclasses.replace(config.output, resume=True))


@pytest.fixture(scope="module")
def whole(fast_compile):
    """Uninterrupted runs by configuration, each trained once."""
    results = {}

    def run(config):
        if config not in results:
            results[config] = train(config, splits=tiny.splits())
        return results[config]

    return run


@pytest.mark.parametrize(
    ("accumulate", "stops"),
    [
        # Before the first step, where a checkpoint is due anyway, and after a refresh.
        (1, [0, 1, 0, 2, 3]),
        (2, [3, 1, 7]),  # inside an accumulation, between two, inside
    ],
)
def test_resume_continues_bit_for_bit(tmp_path, whole, accumulate, stops):
    # Without an evaluation in between, of which the batches count too.
    config = tiny.run_config(accumulate=accumulate, output={"eval_every": 8})
    done = 0
    for batches in stops:
        part = train(
            resumed(config), splits=tiny.splits(), run_dir=tmp_path, should_stop=tiny.after(batches)
        )
        done += batches
        assert part.steps == done // accumulate
        assert not part.finished

    result = train(resumed(config), splits=tiny.splits(), run_dir=tmp_path)

    assert result.finished
    tiny.assert_same_bits(result.state, whole(config).state)
    assert untimed(result.records) == untimed(whole(config).records)
    assert read_metrics(tmp_path / "metrics.jsonl") == result.records


def test_a_stop_in_an_evaluation_is_made_up_for(tmp_path, whole):
    """Within the validation after step 4, where a checkpoint is due, and within the test."""
    config = tiny.run_config(output={"save_every": 4})
    asked = []

    def stop_at(call):
        asked.clear()

        def should_stop():
            asked.append(None)
            return len(asked) >= call

        return should_stop

    # Six batches of two rows of eight tokens: the validation split has 101, the test split 90.
    # It is asked before the first step too.
    for call, step, known in ((1 + 6, 4, 0), (6 + 1 + 4 + 6 + 3, 8, 2)):
        part = train(
            resumed(config), splits=tiny.splits(), run_dir=tmp_path, should_stop=stop_at(call)
        )
        # It does not wait for the end of the evaluation, whose loss is not known.
        assert (part.steps, part.finished, len(asked)) == (step, False, call)
        kinds = [record["kind"] for record in part.records]
        assert kinds.count("validation") == known and "test" not in kinds
        assert (tmp_path / "checkpoints" / str(step)).is_dir()

    result = train(resumed(config), splits=tiny.splits(), run_dir=tmp_path)
    assert result.finished
    tiny.assert_same_bits(result.state, whole(tiny.run_config()).state)
    assert untimed(result.records) == untimed(whole(tiny.run_config()).records)


def test_steps_after_the_last_checkpoint_are_run_again_and_recorded_once(tmp_path, whole):
    config = tiny.run_config()
    train(config, splits=tiny.splits(), run_dir=tmp_path, should_stop=tiny.after(3))
    log = tmp_path / "metrics.jsonl"
    first = log.read_text()
    # What a run leaves that is killed at step 5, in the middle of a line.
    later = first.splitlines()[-1].replace('"step": 3', '"step": 4')
    log.write_text(first + later + "\n" + later.replace('"step": 4', '"step": 5')[:20])

    result = train(resumed(config), splits=tiny.splits(), run_dir=tmp_path)

    assert untimed(result.records) == untimed(whole(config).records)
    assert read_metrics(log) == result.records


def test_a_run_that_was_stopped_within_a_step_may_end_at_the_step_before(tmp_path, whole):
    config = tiny.run_config(accumulate=2, output={"eval_every": 8})
    train(config, splits=tiny.splits(), run_dir=tmp_path, should_stop=tiny.after(5))
    shorter = resumed(dataclasses.replace(config, steps=2))
    result = train(shorter, splits=tiny.splits(), run_dir=tmp_path)
    assert result.finished
    kinds = [(record["kind"], record["step"]) for record in result.records]
    assert kinds == [("train", 1), ("train", 2), ("validation", 2), ("test", 2)]
    longer = train(resumed(config), splits=tiny.splits(), run_dir=tmp_path)
    tiny.assert_same_bits(longer.state, whole(config).state)


@pytest.fixture(scope="module")
def begun(fast_compile, tmp_path_factory):
    """The directory of a run that was stopped after its first step; what follows is refused."""
    run_dir = tmp_path_factory.mktemp("begun")
    train(tiny.run_config(), splits=tiny.splits(), run_dir=run_dir, should_stop=tiny.after(1))
    return run_dir


def test_a_run_is_not_overwritten_unasked(begun):
    with pytest.raises(ConfigError, match="--resume"):
        train(tiny.run_config(), splits=tiny.splits(), run_dir=begun)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"model": dataclasses.replace(tiny.MODEL, layers=3)}, "model.layers: 2 -> 3"),
        ({"optimizer": OptimizerConfig(name="adamw")}, "optimizer.name: natural-galore -> adamw"),
        (
            {"optimizer": dataclasses.replace(tiny.NATURAL_GALORE, rank=2, damping=0.5)},
            "optimizer.damping: (default) -> 0.5, optimizer.rank: 4 -> 2",
        ),
    ],
)
def test_another_configuration_is_refused(begun, changes, message):
    config = resumed(dataclasses.replace(tiny.run_config(), **changes))
    with pytest.raises(ConfigError) as error:
        train(config, splits=tiny.splits(), run_dir=begun)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_another_text_is_refused(begun):
    with pytest.raises(ConfigError, match="text: tiny 0 -> tiny 1"):
        train(resumed(tiny.run_config()), splits=tiny.splits(seed=1), run_dir=begun)


def test_what_is_shown_and_kept_may_change(tmp_path, whole):
    """And once more, of a run that is finished: nothing changes."""
    config = tiny.run_config()
    train(config, splits=tiny.splits(), run_dir=tmp_path, should_stop=tiny.after(2))
    other = tiny.run_config(
        data=DataConfig(cache_dir=tmp_path / "elsewhere"),
        output={"resume": True, "log_every": 2, "save_every": 5, "keep": 1, "quiet": True},
    )
    result = train(other, splits=tiny.splits(), run_dir=tmp_path)
    tiny.assert_same_bits(result.state, whole(config).state)
    steps = [r["step"] for r in result.records if r["kind"] == "train"]
    assert steps == [1, 2, 4, 6, 8]

    again = train(other, splits=tiny.splits(), run_dir=tmp_path)
    assert again.finished and again.records == result.records
    tiny.assert_same_bits(again.state, result.state)
