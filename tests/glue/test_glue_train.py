"""Fine-tuning of a tiny encoder: what each method trains, what it costs, and that it can go on."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import tiny_encoder as tiny
from flax.traverse_util import flatten_dict, unflatten_dict

import natgalore_jax as ng
from examples.common.checkpoints import kept
from examples.common.errors import CheckpointError, ConfigError, DataError, WeightsError
from examples.common.lora import add_adapters, merge_adapters, union
from examples.common.metrics import of_kind
from examples.common.reporter import Reporter
from examples.common.train_state import init_state
from examples.finetune.encoder.config import EncoderConfig
from examples.finetune.encoder.data.batches import Layout, make_batch
from examples.finetune.encoder.loop import train, write_predictions
from examples.finetune.encoder.methods import LEARNING_RATES, MethodConfig, lora_on, set_up
from examples.finetune.encoder.model import make_model
from examples.finetune.encoder.prepare import prepare
from examples.finetune.encoder.run_config import OutputConfig, RunConfig
from examples.finetune.encoder.train_step import decisions, make_predict, make_step, predictions
from examples.finetune.encoder.weights import load_model

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("glue")
    tiny.write_rows(directory, {"train": 220, "dev": 20})
    tensors = {k: v for k, v in tiny.weights("bert").items() if not k.startswith("classifier")}
    return tiny.write_model(directory / "model", tensors=tensors), directory


def config(files, **changes):
    options = MethodConfig(rank=2, update_interval=3, learning_rate=0.007)
    return RunConfig(
        task="own",
        data=files[1],
        model=str(files[0]),
        batch_size=16,
        max_length=16,
        epochs=7,
        **{"method": options, "output": OutputConfig(log_every=7), **changes},
    )


@pytest.fixture(scope="module")
def finished(files):
    run = config(files)
    return train(run, "natural-galore", prepare(run))


def test_other_rows_are_another_run(files, tmp_path):
    """Of the split that is evaluated, too."""
    fingerprints = set()
    for rows in (20, 21):
        tiny.write_rows(tmp_path, {"train": 220, "dev": rows})
        fingerprints.add(prepare(config((files[0], tmp_path))).fingerprint)
    assert len(fingerprints) == 2


def test_predictions_are_in_the_order_of_the_file(files, finished, tmp_path):
    rows = tiny.sentences(40, seed=5)
    text = "".join(json.dumps({"sentence1": sentence}) + "\n" for sentence, _ in rows)
    (files[1] / "test.jsonl").write_text(text)
    prepared = prepare(config(files, output=OutputConfig(predict=True)))
    write_predictions(finished, prepared, tmp_path)
    lines = (tmp_path / "predictions.tsv").read_text().splitlines()
    assert lines[1:] == [f"{i}\t{label}" for i, (_, label) in enumerate(rows)]


def test_the_limit_of_rows_is_that_of_baseline_and_batches_too(files):
    prepared = prepare(config(files, limit=5))
    assert len(prepared.rows.splits["train"]) == len(prepared.encoded["train"].tokens) == 5
    assert prepared.layout.batch_size == 5


@pytest.mark.parametrize("method", ["lora", "natural-galore"])
def test_it_learns(files, method, request):
    prepared = prepare(config(files))
    if method == "lora":
        result = train(config(files), method, prepared)
    else:
        result = request.getfixturevalue("finished")
    summary = result.summary()
    assert summary["train_loss"] < 0.4  # It begins at 0.69.
    assert summary["metrics"]["validation"]["accuracy"] == 1.0
    encoded, predict = prepared.encoded["validation"], make_predict(result.tuning.model)
    outputs = predictions(predict, result.state.weights, encoded, prepared.layout)
    loss = -np.mean(scipy.special.log_softmax(outputs, axis=1)[range(len(outputs)), encoded.labels])
    assert summary["losses"]["validation"] == pytest.approx(loss, rel=1e-4)
    assert [r["step"] for r in of_kind(result.records, "validation")] == list(range(14, 99, 14))
    frozen = flatten_dict(result.tuning.frozen)
    for path, leaf in flatten_dict(result.state.frozen).items():
        np.testing.assert_array_equal(leaf, frozen[path])
    before = flatten_dict(prepared.pretrained.params)
    after = flatten_dict(result.tuning.plain(result.state.weights))
    assert before.keys() == after.keys()
    # LoRA's adapters are merged into the matrices.
    assert all(np.any(before[p] != after[p]) for p in before if p[-1] == "kernel")


def test_what_each_method_trains(files):
    loaded = load_model(files[0], 2, seed=0)
    everything = flatten_dict(loaded.params).keys()
    tables = {path for path in everything if path[-1] == "embedding"}

    def trained(method, **options):
        options, rate = MethodConfig(rank=2, **options), optax.constant_schedule(0.1)
        found = set_up(method, options, loaded.config, loaded.params, rate, seed=0)
        jax.tree.map(np.testing.assert_array_equal, found.plain(union(*found[1:3])), loaded.params)
        return flatten_dict(found.trained).keys()

    assert trained("adamw") == everything
    assert trained("natural-galore") == everything
    assert trained("galore", embeddings="frozen") == everything - tables
    lora = trained("lora", targets=("query",))
    names = {".".join(path) for path in lora if path[0] != "head"}
    assert names == {f"layers.attention.query.lora.lora_{x}" for x in "ab"}
    assert {path for path in lora if path[0] == "head"} == {p for p in everything if p[0] == "head"}


def test_state_is_that_of_the_formulas_and_at_most_that_of_lora():
    """At the sizes of MiniLM, but for the vocabulary."""
    config = EncoderConfig("bert", 100, 384, 1536, 6, 12, positions=50, token_types=2)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), make_model(config)[1])

    def numbers(method, rank, embeddings="frozen", bits=None, **options):
        options |= {"embeddings": embeddings, "moment_bits": bits}
        options, rate = MethodConfig(rank=rank, **options), optax.constant_schedule(0.1)
        found = set_up(method, options, config, params, rate, seed=0)
        # Without the counters of steps.
        return ng.memory_report(found.tx, found.trained).total_state_bytes // 4 // 10 * 10

    d, wide, layers = 384, 1536, 6
    sides = layers * (4 * (d + d) + 2 * (d + wide))
    head = d * d + d + 2 * d + 2
    everything = sum(x.size for x in jax.tree.leaves(params))
    assert numbers("adamw", 2) == 2 * everything // 10 * 10
    vectors = layers * (4 * d + wide + d + 4 * d) + 2 * d + head - d * d
    for rank in (4, 8):
        lora = numbers("lora", rank)
        assert lora == 2 * (rank * sides + head) // 10 * 10
        # A basis of r times the shorter side, moments of r times the longer one.
        square, oblong = 3 * d, d + 2 * wide
        galore = rank * (layers * (4 * square + 2 * oblong) + square) + 2 * vectors
        assert numbers("galore", rank) == galore // 10 * 10
        assert galore < numbers("natural-galore", rank) < 1.1 * galore < lora
    full, projected = (
        numbers("galore", 4, embeddings=kind) - numbers("galore", 4)
        for kind in ("full", "projected")
    )
    assert full == pytest.approx(2 * d * (100 + 50 + 2), abs=20)
    # The basis is of the shorter side, the vocabulary here.
    assert projected == pytest.approx(4 * (100 + 50 + 2 * 2 * d) + 2 * 2 * d, abs=20)
    head_in_full = numbers("galore", 4, project_head=False) - numbers("galore", 4)
    assert head_in_full == pytest.approx(2 * d * d - 4 * 3 * d, abs=20)


def test_lora_starts_as_the_model_and_merges_into_it(files):
    loaded = load_model(files[0], 2, seed=0)
    modules = ("layers.attention.query", "layers.mlp.output")
    adapted, like = make_model(loaded.config, lora_on(modules, 2, 1.5))
    weights = add_adapters(loaded.params, like, seed=0)
    inputs = tiny.inputs("bert")
    plain = jax.jit(make_model(loaded.config)[0])
    adapted = jax.jit(adapted)
    np.testing.assert_allclose(
        adapted(weights, inputs), plain(loaded.params, inputs), rtol=0, atol=1e-6
    )
    lively = {
        path: jax.random.normal(jax.random.key(i), leaf.shape) if path[-1] == "lora_b" else leaf
        for i, (path, leaf) in enumerate(flatten_dict(weights).items())
    }
    lively = unflatten_dict(lively)
    merged = merge_adapters(lively, 1.5)
    assert jax.tree.structure(merged) == jax.tree.structure(loaded.params)
    outputs = adapted(lively, inputs)
    assert np.abs(outputs - plain(loaded.params, inputs)).max() > 0.01
    np.testing.assert_allclose(outputs, plain(merged, inputs), rtol=0, atol=1e-4)


def test_a_run_to_resume_that_is_not_there_is_said(files, tmp_path):
    """Its name may be mistyped."""
    run = dataclasses.replace(config(files), output=OutputConfig(resume=True))
    reporter, notes = Reporter(), []
    reporter.note = notes.append
    given = {"run_dir": tmp_path, "reporter": reporter, "should_stop": lambda: True}
    assert train(run, "adamw", prepare(run), **given).steps == 0
    assert f"{tmp_path} has no checkpoint yet: starting at the first step" in notes


def test_a_run_goes_on_as_if_it_had_not_been_stopped(files, finished, tmp_path):
    run, expected = config(files), finished
    prepared = prepare(run)
    again = dataclasses.replace(run, output=OutputConfig(resume=True, log_every=7))

    def stop_at(call, config):
        count = iter(range(100))
        return train(
            config,
            "natural-galore",
            prepared,
            run_dir=tmp_path,
            should_stop=lambda: next(count) == call,
        )

    # An epoch is 14 steps, and an evaluation two batches: stopped before the second of them.
    stopped = stop_at(1 + 15, run)
    assert (stopped.steps, stopped.finished) == (14, False)
    assert not of_kind(stopped.records, "validation")
    # It begins with that evaluation, and is stopped after a step.
    stopped = stop_at(2 + 1 + 14 + 2 + 4, again)
    assert (stopped.steps, stopped.finished) == (33, False)
    assert [r["step"] for r in of_kind(stopped.records, "validation")] == [14, 28]
    resumed = train(again, "natural-galore", prepared, run_dir=tmp_path)
    assert resumed.finished
    jax.tree.map(np.testing.assert_array_equal, resumed.state.weights, expected.state.weights)
    kinds = [(r["kind"], r["step"]) for r in resumed.records]
    assert [step for kind, step in kinds if kind == "validation"] == list(range(14, 99, 14))

    with pytest.raises(ConfigError, match="already has a run"):
        train(run, "natural-galore", prepared, run_dir=tmp_path)
    other = dataclasses.replace(again, epochs=8)
    with pytest.raises(ConfigError, match="epochs: 7 -> 8"):
        train(other, "natural-galore", prepared, run_dir=tmp_path)
    # The model that was written is the one that was trained.
    loaded = load_model(tmp_path / "model", 2, seed=9)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.state.weights)
    assert loaded.raw_config["id2label"] == {"0": "0", "1": "1"}

    # A finished run predicts later, for rows that it did not have then, and trains no further.
    rows = tiny.sentences(6, seed=5)
    text = "".join(json.dumps({"sentence1": sentence}) + "\n" for sentence, _ in rows)
    (files[1] / "test.jsonl").write_text(text)
    predicting = dataclasses.replace(run, output=OutputConfig(resume=True, predict=True))
    (tmp_path / "model" / "config.json").unlink()
    given = {"prepared": prepare(predicting), "run_dir": tmp_path}
    # The model does not wait for the predictions, which may take long and can be stopped.
    stopped = train(predicting, "natural-galore", **given, should_stop=lambda: True)
    assert not stopped.finished and not (tmp_path / "predictions").exists()
    assert (tmp_path / "model" / "config.json").exists()
    later = train(predicting, "natural-galore", **given)
    assert later.finished and later.records == resumed.records
    jax.tree.map(np.testing.assert_array_equal, later.state.weights, expected.state.weights)
    lines = (tmp_path / "predictions" / "predictions.tsv").read_text().splitlines()
    assert lines[1:] == [f"{i}\t{label}" for i, (_, label) in enumerate(rows)]

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b"\xff" + metrics.read_bytes())
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: no metrics of the 98 steps"):
        train(again, "natural-galore", prepared, run_dir=tmp_path)
    file = tmp_path / "checkpoints" / "98" / "config" / "metadata"
    file.write_text("{")
    with pytest.raises(CheckpointError, match=f"{file}: 1 bytes instead of"):
        train(again, "natural-galore", prepared, run_dir=tmp_path)


def counts(weights, inputs, _key=None):
    """A model that is quick to compile: outputs by how often a row has each token."""
    tokens = jax.nn.one_hot(inputs.tokens, 50) * inputs.mask[..., None]
    return tokens.sum(axis=1) @ weights


def test_empty_rows_of_a_batch_count_nothing(files):
    prepared = prepare(config(files))
    tx, layout = optax.sgd(0.1), Layout(9, 16, 0)
    step = make_step(counts, tx, regression=False, seed=0)
    batch = make_batch(prepared.encoded["train"], np.arange(6), layout)
    other = make_batch(prepared.encoded["train"], np.arange(9), layout)
    assert not np.array_equal(batch.inputs.tokens, other.inputs.tokens)
    found = []
    for rows, weight in ((batch, batch.weight), (other, batch.weight), (other, other.weight)):
        params = jax.random.normal(jax.random.key(0), (50, 2))
        found.append(step(init_state(params, tx), rows._replace(weight=weight)))
    (empty, metrics), (ignored, same), (_, others) = found
    assert float(metrics["loss"]) == pytest.approx(float(same["loss"]), abs=1e-6)
    assert float(metrics["loss"]) != pytest.approx(float(others["loss"]), abs=1e-4)
    np.testing.assert_allclose(empty.params, ignored.params, rtol=0, atol=1e-6)


def test_a_method_of_a_comparison_is_a_model(files, tmp_path):
    method = tmp_path / "adamw"
    shutil.copytree(files[0], method / "model")
    (method / "config.json").write_text("{}")  # Of the run.
    assert (
        prepare(dataclasses.replace(config(files), model=str(method))).pretrained.directory
        == method / "model"
    )
    with pytest.raises(WeightsError, match=f"a comparison of methods: name one of {method}$"):
        prepare(dataclasses.replace(config(files), model=str(tmp_path)))


def test_true_is_no_number_of_a_regression(files, tmp_path):
    rows = tiny.write_rows(tmp_path)
    (rows / "train.jsonl").write_text('{"sentence1": "a", "label": true}\n')
    with pytest.raises(DataError, match=r"line 1: the label True is no number from -1e\+18 to 1e"):
        prepare(dataclasses.replace(config(files), task="own-regression", data=rows))


def test_a_regression(files, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows", label=lambda y: 2.0 * y + 0.5)
    prepared = prepare(dataclasses.replace(config(files), task="own-regression", data=rows))
    assert prepared.pretrained.config.outputs == 1
    encoded = prepared.encoded["train"]
    batch = make_batch(encoded, np.arange(4), prepared.layout)
    weights = jax.random.normal(jax.random.key(0), (50, 1))
    W = np.asarray(weights, np.float64)
    expected = np.array([W[row, 0].sum() for row in encoded.tokens])
    step = make_step(counts, optax.sgd(0.1), regression=True, seed=0)
    _, metrics = step(init_state(weights, optax.sgd(0.1)), batch)
    assert float(metrics["loss"]) == pytest.approx(
        np.mean((expected - encoded.labels)[:4] ** 2), rel=1e-5
    )
    found = predictions(make_predict(counts), jnp.array(W), encoded, prepared.layout)
    np.testing.assert_allclose(decisions(found, True), expected, rtol=1e-5, atol=1e-5)


def test_labels_of_a_regression_may_have_any_unit(files, tmp_path):
    """Predictions are near the labels after a few steps, and nearer after more of a saved model."""
    rows = tiny.write_rows(tmp_path / "rows", label=lambda y: 4000.0 + 900 * y)
    (rows / "test.jsonl").write_text((rows / "dev.jsonl").read_text())
    run = config(files, output=OutputConfig(predict=True))
    run = dataclasses.replace(run, epochs=6, task="own-regression", data=rows)
    errors = []
    for name in ("first", "again"):
        assert train(run, "adamw", prepare(run), run_dir=tmp_path / name).finished
        lines = (tmp_path / name / "predictions" / "predictions.tsv").read_text().splitlines()[1:]
        found = np.array([float(line.split("\t")[1]) for line in lines])
        labels = np.array([4000 + 900 * (i % 2) for i in range(len(found))])
        errors.append(np.sqrt(np.mean((found - labels) ** 2)))
        run = dataclasses.replace(run, model=str(tmp_path / name / "model"))
    assert errors[1] < errors[0] < 400  # The mean of the labels is 450 off.


def test_a_limit_may_leave_out_a_class(files, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows", label=lambda y: f"class{y}")
    run = dataclasses.replace(config(files), data=rows, limit=1)
    (note,) = [note for note in prepare(run).notes() if "limit" in note]
    assert note.startswith("--limit leaves no training row of the class class")


def test_what_cannot_be_trained(files, monkeypatch):
    for options, message in (
        ({"targets": ("queries",)}, "no matrix is called 'queries'; there are bert.encoder"),
        ({"rank": 16}, "rank must be below the smallest side of the matrices, 16; got 16"),
    ):
        run = config(files, method=MethodConfig(**{"rank": 2, **options}))
        for method in ("lora", "galore"):
            with pytest.raises(ConfigError, match=message):
                train(run, method, prepare(run))
    monkeypatch.setattr(
        "examples.finetune.encoder.loop.make_step",
        lambda *_, **__: lambda state, _: (state, {"loss": jnp.nan}),
    )
    run = config(files)
    with pytest.raises(ConfigError, match=r"natural-galore: the loss is not finite at step 7"):
        train(run, "natural-galore", prepare(run))


def test_weights_that_are_not_finite_are_not_saved(files, monkeypatch, tmp_path):
    def lose(state, _):
        lost = jax.tree.map(lambda x: x * jnp.nan, state.params)
        return state._replace(params=lost), {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}

    monkeypatch.setattr("examples.finetune.encoder.loop.make_step", lambda *_, **__: lose)
    run = config(files, output=OutputConfig(log_every=7, root=tmp_path))
    with pytest.raises(ConfigError, match="the result of an update is not finite at step"):
        train(run, "natural-galore", prepare(run), run_dir=tmp_path)
    assert kept(tmp_path / "checkpoints") == []


def test_every_method_has_a_learning_rate_and_can_be_set_up(files):
    loaded = load_model(files[0], 2, seed=0)
    for method, rate in LEARNING_RATES.items():
        assert 0 < rate < 1
        options = MethodConfig(rank=2)
        assert options.peak(method) == rate
        found = set_up(
            method, options, loaded.config, loaded.params, optax.constant_schedule(rate), seed=0
        )
        assert found.trained
