"""Fine-tuning a tiny LLaMA on plans: what is learned, what is kept, and that it can go on."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_planner as tiny
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from examples.common.errors import ConfigError, DataError, WeightsError
from examples.common.lora import union
from examples.common.metrics import of_kind
from examples.common.reporter import Reporter
from examples.common.train_state import init_state
from examples.finetune.planner.batches import Layout, Shape, batches, make_layout, train_steps
from examples.finetune.planner.encode import Chat, Row
from examples.finetune.planner.evaluate import Evaluator
from examples.finetune.planner.loop import best_epoch, read_best, train
from examples.finetune.planner.methods import LEARNING_RATES, MethodConfig, set_up
from examples.finetune.planner.prepare import prepare
from examples.finetune.planner.prompts import Pair, PromptConfig
from examples.finetune.planner.run_config import OutputConfig, RunConfig
from examples.finetune.planner.train_step import make_step
from examples.finetune.planner.untrained import evaluate_untrained
from examples.llama.model.llama import with_params
from examples.pretrained.chat import ChatTemplate

pytestmark = pytest.mark.usefixtures("fast_compile")

logits_of = jax.jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return RunConfig(
        **tiny.options(tmp_path_factory.mktemp("planner")),
        prompt=PromptConfig(examples=0, negatives=1, details=False),
        method=MethodConfig(rank=2, update_interval=2, learning_rate=0.01),
    )


@pytest.fixture(scope="module")
def prepared(config):
    return prepare(config)


@pytest.fixture(scope="module")
def evaluator(config, prepared):
    return Evaluator(prepared, batch_size=2, plans_at_once=2, new_tokens=config.new_tokens)


@pytest.fixture(scope="module")
def untrained(prepared, evaluator):
    return evaluator(prepared.read(), "validation").summary()


@pytest.fixture
def run(config, prepared, evaluator, untrained):
    """Train with AdamW, which is compiled the fastest."""

    def go(run_dir, should_stop=lambda: False, **output):
        changed = dataclasses.replace(config, output=OutputConfig(**output))
        given = (prepared, evaluator, untrained, run_dir, Reporter(), should_stop)
        return train(changed, "adamw", *given)

    return go


def test_weights_from_anywhere_are_placed_alike(evaluator, prepared):
    """Else jit compiles anew, and the seconds of a plan are those of a compilation."""
    fresh = prepared.read()
    bound = jax.device_put(fresh, jax.devices()[0])
    for params in (fresh, bound):
        model = evaluator._unstacked(params)
        assert all(leaf.committed for leaf in jax.tree.leaves(nnx.state(model)))


def test_the_first_evaluation_is_not_written_in_part(config, tmp_path, monkeypatch):
    splits = dict.fromkeys(("validation", "test"), SimpleNamespace(records=()))
    prepared = SimpleNamespace(fingerprint="", read=dict, splits=splits)
    evaluation = SimpleNamespace(predictions=(), summary=dict)

    def killed(*_):
        raise OSError

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "replace", killed)
        evaluate_untrained(config, prepared, lambda *_: evaluation, tmp_path, Reporter())
    assert not (tmp_path / "untrained.json").exists()


def nll(config, params, row):
    """Of the learned tokens of one row, in float64, from the logits of the whole row."""
    # What comes later in the row has no influence: one program for all rows.
    tokens = jnp.asarray(np.pad(row.tokens, (0, 500 - len(row.tokens))))[None]
    logits = np.asarray(logits_of(with_params(config, params), tokens), np.float64)[0]
    total = 0.0
    for i in range(row.prompt, len(row.tokens)):
        scores = logits[i - 1]
        total += np.log(np.sum(np.exp(scores - scores.max()))) + scores.max()
        total -= scores[row.tokens[i]]
    return total


def test_the_loss_is_of_the_learned_tokens_of_all_batches_of_a_step(prepared):
    rows = prepared.splits["train"].rows[:5]
    params = prepared.read()
    expected = sum(nll(prepared.model, params, row) for row in rows)
    expected /= sum(len(row.tokens) - row.prompt for row in rows)
    graphdef = nnx.graphdef(with_params(prepared.model, params))
    tx = optax.sgd(0.1)
    parts = [batch for _, batch in batches(rows, prepared.layout, 2)]
    assert len(parts) == 3  # The last one has an empty row.
    state, metrics = make_step(graphdef, tx)(init_state(params, tx), parts)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    # One batch of all of them makes the same step.
    (_, whole), *none = batches(rows, make_layout(rows, 1), 5)
    other, _ = make_step(graphdef, tx)(init_state(prepared.read(), tx), [whole])
    assert not none
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state.params, other.params
    )


def test_prompt_and_plan_are_encoded_as_the_template_has_them(prepared):
    chat, pair = prepared.chat, Pair("Question: Call Ann.\n", "1. join()\n<END_OF_PLAN>")
    row = chat.encode(pair)
    decoded = [
        chat.tokenizer.decode(part.tolist(), skip_special_tokens=False)
        for part in (row.tokens[: row.prompt], row.tokens[row.prompt :])
    ]
    assert decoded == [
        f"<|begin|>user\nQuestion: Call Ann.\n{tiny.END}\nassistant\n",
        f"1. join()\n<END_OF_PLAN>{tiny.END}",  # Without the line break behind it.
    ]
    plain = chat._replace(template=None).encode(pair)
    text = chat.tokenizer.decode(plain.tokens.tolist(), skip_special_tokens=False)
    assert text == pair.prompt + pair.completion + tiny.END
    other = ChatTemplate("{{ messages|length }}{{ messages[0]['content'] }}", {})
    with pytest.raises(WeightsError, match="begins an answer in one way and shows it in another"):
        Chat(chat.tokenizer, other, chat.end_ids).encode(pair)


def test_batches():
    lengths = [(5, 3), (30, 40), (20, 4), (60, 5), (61, 5)]
    rows = [Row(np.arange(1, p + c + 1, dtype=np.int32), p) for p, c in lengths]
    layout = make_layout(rows, 2)
    assert layout == Layout((Shape(64, 32), Shape(96, 64)))
    assert make_layout(rows[:1], 4) == Layout((Shape(32, 32),))
    seen = list(batches(rows, layout, 2))
    assert [numbers for numbers, _ in seen] == [[0, 2], [3, 4], [1]]
    batch = seen[0][1]
    np.testing.assert_array_equal(batch.tokens[0, :8], [1, 2, 3, 4, 5, 6, 7, 0])
    np.testing.assert_array_equal(batch.positions[0, :4], [4, 5, 6, 0])
    np.testing.assert_array_equal(batch.targets[0, :4], [6, 7, 8, 0])
    np.testing.assert_array_equal(batch.weight.sum(axis=1), [3, 4])

    def drawn(start, number):
        steps = train_steps(rows, layout, 1, 2, seed=0, start=start)
        found = [next(steps) for _ in range(number)]
        return [[int(batch.weight.sum()) for batch in step] for step in found]

    epochs = drawn(0, 6)
    assert [len(step) for step in epochs] == [2, 2, 1, 2, 2, 1]
    for epoch in (epochs[:3], epochs[3:]):
        assert sorted(itertools.chain(*epoch)) == [3, 4, 5, 5, 40]
    assert drawn(4, 2) == epochs[4:]
    ((batch,),) = itertools.islice(train_steps(rows, layout, 10**9, 1, seed=0, start=0), 1)
    assert batch.tokens.shape == (5, 96)


def test_a_run_goes_on_as_if_it_had_not_been_stopped(run, config, prepared, tmp_path):
    expected = run(tmp_path / "whole")
    assert expected.finished and expected.steps == 8
    stopped = run(tmp_path / "run", lambda: True)  # Before the first step.
    assert (stopped.steps, stopped.finished) == (0, False)
    count = iter(range(10_000))
    stopped = run(tmp_path / "run", lambda: next(count) == 3, resume=True)  # After its third step.
    assert (stopped.steps, stopped.finished) == (3, False)

    # Stopped in the validation of the first epoch: the step of that epoch is done and saved.
    count = iter(range(10_000))
    stopped = run(tmp_path / "run", lambda: next(count) == 3, resume=True)
    assert (stopped.steps, stopped.finished) == (4, False)
    assert [r["step"] for r in of_kind(stopped.records, "validation")] == [0]
    resumed = run(tmp_path / "run", resume=True)
    assert resumed.finished
    jax.tree.map(np.testing.assert_array_equal, resumed.state.weights, expected.state.weights)

    def timeless(records):
        names = ("seconds", "seconds_per_plan")
        return [{k: v for k, v in record.items() if k not in names} for record in records]

    assert timeless(resumed.records) == timeless(expected.records)
    losses = [r["loss"] for r in of_kind(resumed.records, "validation")]
    assert losses[2] < losses[1] < losses[0]  # It learns.
    # No plan succeeds in so few steps: the best epoch is that of the lowest loss.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_epoch"] == 2
    best = read_best(prepared, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, best, resumed.state.weights)
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert len(predictions) == 2
    assert all(row["verdict"].startswith("no plan: ") for row in predictions)

    with pytest.raises(ConfigError, match="already has a run"):
        run(tmp_path / "run")


def test_the_best_epoch():
    def record(step, success, loss):
        return {"kind": "validation", "step": step, "loss": loss, "metrics": {"success": success}}

    train = {"kind": "train", "step": 1, "loss": 0.0}
    records = [record(0, 0.9, 0.1), train, record(1, 0.5, 0.3), record(2, 0.6, 0.5)]
    assert best_epoch(records)["step"] == 2
    records += [record(3, 0.6, 0.4), record(4, 0.6, 0.4)]
    assert best_epoch(records)["step"] == 3


def test_lora_starts_as_the_model_and_merges_into_it(prepared, config):
    params, rate = prepared.read(), optax.constant_schedule(0.1)
    found = set_up("lora", config.method, prepared.model, params, rate, seed=0)
    weights = union(found.trained, found.frozen)
    tokens = jnp.arange(40).reshape(2, 20)
    adapted = jax.jit(lambda weights: nnx.merge(found.model, weights)(tokens))
    plain = logits_of(with_params(prepared.model, params), tokens)
    np.testing.assert_allclose(adapted(weights), plain, rtol=0, atol=1e-6)
    lively = unflatten_dict(
        {
            path: 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
            if path[-1] == "lora_b"
            else leaf
            for i, (path, leaf) in enumerate(flatten_dict(weights).items())
        }
    )
    outputs, merged = adapted(lively), found.plain(lively)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert np.abs(outputs - plain).max() > 0.01
    np.testing.assert_allclose(
        outputs, logits_of(with_params(prepared.model, merged), tokens), rtol=0, atol=1e-4
    )


def test_what_each_method_trains(prepared):
    params, rate = prepared.read(), optax.constant_schedule(0.1)
    everything = flatten_dict(params).keys()

    def trained(method, **options):
        options = MethodConfig(rank=2, **options)
        assert options.peak(method) == LEARNING_RATES[method]
        found = set_up(method, options, prepared.model, params, rate, seed=0)
        return flatten_dict(found.trained).keys()

    for method in LEARNING_RATES:
        if method not in ("adamw", "lora"):
            assert trained(method) == everything - {("embed", "embedding")}
    assert trained("adamw") == trained("galore", embeddings="full") == everything
    assert trained("adamw", scale=0.0) == everything  # Which LoRA alone refuses.
    assert {path[-1] for path in trained("lora")} == {"lora_a", "lora_b"}
    assert len(trained("lora")) == 14


def test_plans_with_special_tokens_of_the_model_are_left_out(config, prepared, tmp_path):
    left_out = prepared.splits["train"].records[0].id
    data = json.loads(config.data.read_text())
    data[left_out]["output"][0]["parsed_output"][0]["tool_args"] = [f"say {tiny.END} now"]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(data))
    found = prepare(dataclasses.replace(config, data=path))
    assert left_out not in {record.id for record in found.splits["train"].records}
    assert any("15 records, 1 others are left out: a special token" in n for n in found.notes)


def test_questions_without_words(config, prepared, tmp_path):
    data = {k: row | {"input": "?!"} for k, row in json.loads(config.data.read_text()).items()}
    path = tmp_path / "records.json"
    path.write_text(json.dumps(data))
    without = dataclasses.replace(config, data=path)
    assert len(prepare(without).splits["train"].rows) == len(prepared.splits["train"].rows)
    with pytest.raises(DataError, match="no question of the train split has a word"):
        prepare(dataclasses.replace(without, prompt=PromptConfig(examples=1)))


def test_files_without_usable_records(config, tmp_path):
    path = tmp_path / "records.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="no records"):
        prepare(dataclasses.replace(config, data=path))
    path.write_text('{"a": 1, "\\ud83d": {}}')
    with pytest.raises(DataError, match=r"no usable record, the first of 2: .*'a'"):
        prepare(dataclasses.replace(config, data=path, skip_unusable=True))


def test_rows_that_are_too_long_are_counted(config, prepared):
    lengths = {
        name: sorted(len(row.tokens) for row in split.rows)
        for name, split in prepared.splits.items()
    }
    # Every split keeps a row.
    cut = max(lengths["train"][9], lengths["validation"][0], lengths["test"][0])
    shorter = dataclasses.replace(config, max_length=cut)
    found = prepare(shorter)
    for name, split in found.splits.items():
        kept = [n for n in lengths[name] if n <= cut]
        assert sorted(len(row.tokens) for row in split.rows) == kept
        assert split.too_long == len(lengths[name]) - len(kept)
        assert [record.id for record in split.records] == [
            record.id
            for record, row in zip(*prepared.splits[name][:2], strict=True)
            if len(row.tokens) <= cut
        ]
    dropped = found.splits["train"].too_long
    assert dropped > 0
    assert any(f"train: {16 - dropped} records, {dropped} others" in n for n in found.notes)
    few = prepare(dataclasses.replace(shorter, limit=4)).splits["train"]
    assert len(few.rows) == 4 <= few.looked_at
    with pytest.raises(ConfigError, match=f"the shortest has {lengths['train'][0]} tokens"):
        prepare(dataclasses.replace(config, max_length=20))
