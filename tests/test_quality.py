"""Runs of the comparison: through the real commands, at a size that takes a moment."""

import dataclasses
import inspect
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng
from benchmarks.common.result_files import read, write
from benchmarks.common.sweep import command, environment
from benchmarks.pretraining.__main__ import main
from benchmarks.pretraining.methods import METHODS, choose, muon
from benchmarks.pretraining.presets import PRESETS
from benchmarks.pretraining.run_spec import Run, prepare
from benchmarks.pretraining.sweep import Sweep, runs
from benchmarks.pretraining.train import diverged, excerpt, thinned
from examples.common.errors import ConfigError
from examples.common.metrics import of_kind
from examples.llama.data import DataConfig, load_splits
from examples.llama.loop import train
from examples.llama.model.config import MODEL_PRESETS
from examples.llama.run_config import RunConfig
from examples.llama.training.train_step import make_model

pytestmark = pytest.mark.usefixtures("fast_compile")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Options for a small text, its name being "words", and a cache of its own."""
    directory = tmp_path_factory.mktemp("quality")
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(["we", "the", "people"], k=60))} for _ in range(60)]
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"corpus": f"words={text}", "cache_dir": directory / "cache"}


@pytest.fixture
def spec(places, tmp_path):
    return Run(
        method="adamw", learning_rate=0.01, preset="tiny", steps=3, root=tmp_path / "root", **places
    )


def arguments(spec):
    return command(spec, "benchmarks.pretraining")[3:]


def test_a_run_writes_one_small_file(spec, capsys):
    assert main(arguments(spec)) == 0
    (path,) = spec.root.rglob("*.json")
    assert path == spec.root / "main" / "words-tiny" / "adamw-lr0.01-x1-seed1.json"
    assert path.stat().st_size < 6_000
    record = read(path)
    tiny = PRESETS["tiny"]
    by_step = tiny.rows * tiny.seq_len
    points = [[step, tokens] for step, tokens, _, _ in record["validation"]]
    assert points == [[1, by_step], [2, 2 * by_step], [3, 3 * by_step]]
    assert record["steps_done"] == 3 and not record["diverged"] and record["workers"] == 1
    assert record["final_validation_loss"] == record["validation"][-1][2]
    assert 0 < record["step_seconds"] < record["training_seconds"] < record["wall_seconds"]
    assert record["environment"]["versions"].keys() >= {"jax", "optax"}
    # Two moments of four bytes, and the counters of Adam and of the schedule.
    assert record["state_bytes"] == 8 * record["parameters"] + 8
    assert record["configuration"]["arguments"]["b2"] == 0.999
    assert record["configuration"]["run"]["schedule"] == {"warmup": 0.1, "floor": 0.1}


def test_a_run_is_that_of_the_training_program(spec):
    assert main(arguments(spec)) == 0
    tiny = PRESETS["tiny"]
    data = DataConfig(
        data=(spec.corpus.partition("=")[2],), vocab_size=300, cache_dir=spec.cache_dir
    )
    splits = load_splits(data)
    config = RunConfig(
        steps=3, batch_size=tiny.rows, seq_len=tiny.seq_len, seed=1, data=data, model=tiny.model
    )
    # One tenth of three steps is no warm-up; then a cosine from 0.01 to 0.001.
    rates = jnp.array([0.01, 0.0055, 0.001])
    tx = optax.adamw(lambda count: rates[count], weight_decay=0.0)
    result = train(config, splits=splits, tx=tx)
    expected = of_kind(result.records, "test")[-1]["loss"]
    assert read(spec.path)["test_loss"] == pytest.approx(expected, abs=2e-5)


def test_micro_batches_change_nothing_but_memory(spec):
    whole = dataclasses.replace(spec, method="adamw")
    split = dataclasses.replace(whole, suite="split", accumulate=2)
    assert main(arguments(whole)) == main(arguments(split)) == 0
    whole, split = read(whole.path), read(split.path)
    assert split["configuration"]["run"]["batch_size"] == 1
    assert split["test_loss"] == pytest.approx(whole["test_loss"], abs=1e-3)
    assert split["state_bytes"] == whole["state_bytes"]
    assert [v[:2] for v in split["validation"]] == [v[:2] for v in whole["validation"]]


def test_a_warm_up_of_another_length(spec):
    longer = prepare(dataclasses.replace(spec, warmup=0.5, steps=10))
    assert longer.configuration["run"]["schedule"]["warmup"] == 0.5
    params = {"norm": {"scale": jnp.ones(8)}}
    update, _ = longer.tx.update(params, longer.tx.init(params), params)
    np.testing.assert_allclose(update["norm"]["scale"], -spec.learning_rate / 6, rtol=1e-5)


def test_rows_of_a_step_may_be_fewer(spec):
    prepared = prepare(dataclasses.replace(spec, rows=1))
    assert prepared.config.batch_size == 1 < prepare(spec).config.batch_size


def test_a_run_that_is_done_is_not_made_again(spec, capsys):
    assert main(arguments(spec)) == 0
    before = spec.path.stat().st_mtime_ns
    assert main(arguments(spec)) == 0
    assert "was there already" in capsys.readouterr().out
    # What an option of the training program that is newer than the file would look like.
    record = read(spec.path)
    del record["configuration"]["run"]["model"]["remat"]
    assert spec.path.stat().st_mtime_ns == before
    write(record, spec.path)
    assert main(arguments(spec)) == 0
    # An optimizer's own default that changed since.
    record["configuration"]["arguments"]["nesterov"] = True
    write(record, spec.path)
    assert main(arguments(spec)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "arguments.nesterov: True -> False" in line
    assert main(arguments(dataclasses.replace(spec, steps=4))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "run.steps: 3 -> 4" in line


def test_a_run_without_end_is_shown_as_diverged(spec):
    spec = dataclasses.replace(spec, learning_rate=1e30)
    assert main(arguments(spec)) == 0
    record = read(spec.path)
    assert record["diverged"] and record["test_loss"] is None
    assert record["final_validation_loss"] is None and record["steps_done"] < 3


def test_diverged():
    assert not diverged([6.0, 5.0]) and not diverged([6.0]) and not diverged([])
    assert diverged([6.0, 5.0, 6.1]) and diverged([6.0, None, 5.0])


def test_a_sweep_goes_on_and_survives_failures(spec, tmp_path):
    common = ["--preset", "tiny", "--steps", "3", "--root", str(spec.root)]
    common += ["--cache-dir", str(spec.cache_dir), "--corpora", spec.corpus]
    grid = ["--methods", "adamw", "galore@rank=99", "--seeds", "1", "--learning-rates", "0.01"]
    command = [sys.executable, "-m", "benchmarks.pretraining", "sweep", "--workers", "2"]
    first = subprocess.run([*command, *common, *grid], cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 1, first.stderr
    assert "2 runs, 0 done, time not known" in first.stdout
    assert "galore@rank=99-lr0.01-x1-seed1: FAILED: error: galore@rank=99: " in first.stdout
    assert "adamw-lr0.01-x1-seed1: validation" in first.stdout
    assert [path.name for path in spec.root.rglob("*.*")] == ["adamw-lr0.01-x1-seed1.json"]
    record = read(spec.path)
    assert record["workers"] == 2 and record["environment"]["usable_cores"] == 1
    assert record["environment"]["threads"]["XLA_FLAGS"].endswith("multi_thread_eigen=false")

    again = subprocess.run(
        [*command, *common, *grid, "--plan"], cwd=ROOT, capture_output=True, text=True
    )
    assert again.returncode == 0
    assert "2 runs, 1 done, about 0 min for the others with 2 at a time" in again.stdout
    assert again.stdout.splitlines()[1:] == [
        str(spec.path.with_name("galore@rank=99-lr0.01-x1-seed1.json"))
    ]


def test_a_sweep_that_is_told_to_end_takes_its_runs_along(spec):
    command = [sys.executable, "-m", "benchmarks.pretraining", "sweep", "--preset", "tiny"]
    command += ["--steps", "1000000", "--root", str(spec.root), "--cache-dir", str(spec.cache_dir)]
    command += ["--corpora", spec.corpus, "--methods", "adamw", "--learning-rates", "0.01"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.terminate()
        pytest.skip("needs /proc")
    own = []
    while not own and process.poll() is None:
        own = [
            pid
            for task in Path(f"/proc/{process.pid}/task").glob("*/children")
            for pid in task.read_text().split()
        ]
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 130
    assert own and not any(Path(f"/proc/{pid}").exists() for pid in own)
    assert not list(spec.root.rglob("*.json"))


def test_an_interrupted_write_leaves_no_file(tmp_path):
    with pytest.raises(ValueError):
        write({"loss": float("nan")}, tmp_path / "a" / "x.json")
    assert not list(tmp_path.rglob("*.json"))


def test_runs_go_seed_by_seed():
    sweep = Sweep(
        methods=("adamw", "muon"), corpora=("sotu", "shakespeare"), seeds=(3, 1),
        learning_rates=("0.01", "0.02"),
    )  # fmt: skip
    planned = runs(sweep)
    assert [run.seed for run in planned] == [3] * 8 + [1] * 8
    assert len({run.path for run in planned}) == 16
    two = dataclasses.replace(sweep, ratios=(1.0, 4.0), methods=("adamw", "adamw-one-rate"))
    assert [run.ratio for run in runs(two)[:6]] == [1.0, 4.0, 1.0, 4.0, 1.0, 1.0]
    assert {run.learning_rate for run in planned[:2]} == {0.01, 0.02}


def test_the_two_rates_of_a_run(tmp_path):
    """Of a method with a scale, the learning rate is scale times what its factory is given."""
    params = {
        "embed": {"embedding": jnp.ones((6, 8))},
        "mlp": {"kernel": jnp.ones((8, 6))},
        "norm": {"scale": jnp.ones(8)},
    }
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)

    def first_update(method, **rates):
        run = Run(method=method, preset="tiny", steps=1, root=tmp_path, **rates)
        tx = prepare(run).tx
        return tx.update(grads, tx.init(params), params)[0]

    def expected(tx):
        return tx.update(grads, tx.init(params), params)[0]

    for method, scale, tx in [
        ("adamw", 1.0, optax.adamw(0.02, weight_decay=0.0)),
        (
            "natural-galore@rank=4",
            1.0,
            ng.natural_galore_adamw(0.02, rank=4, weight_decay=0.0, unprojected_ratio=1.0, seed=1),
        ),
        ("galore@rank=4", 0.25, ng.galore_adamw(0.08, rank=4, method="svd", weight_decay=0.0)),
    ]:
        # One tenth of one step is no warm-up, and the first rate is the peak.
        whole = expected(tx)
        two = first_update(method, learning_rate=0.02, ratio=8.0)
        np.testing.assert_allclose(two["mlp"]["kernel"], whole["mlp"]["kernel"], rtol=1e-5)
        np.testing.assert_allclose(
            two["embed"]["embedding"], 8 * scale * whole["embed"]["embedding"], rtol=1e-5
        )
        apart = first_update(method, learning_rate=0.02, ratio=8.0, norm_ratio=3.0)
        np.testing.assert_allclose(
            apart["norm"]["scale"], 3 * scale * whole["norm"]["scale"], rtol=1e-5
        )
        for name in ("embed", "mlp"):
            chex.assert_trees_all_close(apart[name], two[name])
    with pytest.raises(ConfigError, match="adamw-one-rate has the ratio 1, got 2"):
        first_update("adamw-one-rate", learning_rate=0.02, ratio=2.0)


def test_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=b")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "7")
    own = environment(2)
    assert own["XLA_FLAGS"] == "--a=b --xla_cpu_multi_thread_eigen=false"
    assert own["MALLOC_TOP_PAD_"] == "7" and own["MALLOC_MMAP_MAX_"] == "0"
    assert environment(1)["XLA_FLAGS"] == "--a=b"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_updates_a_model(name, tmp_path):
    prepared = prepare(Run(method=name, learning_rate=0.01, preset="tiny", root=tmp_path))
    json.dumps(prepared.configuration, allow_nan=False)
    params = jax.eval_shape(lambda: make_model(prepared.config.model, 0)[1])
    state = jax.eval_shape(prepared.tx.init, params)
    updates, new_state = jax.eval_shape(prepared.tx.update, params, state, params)
    like = jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == like
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_galore_takes_the_rank_of_the_preset(tmp_path):
    def arguments(method):
        run = Run(method=method, learning_rate=0.01, root=tmp_path)
        return prepare(run).configuration["arguments"]

    assert arguments("galore")["rank"] == 32 and arguments("galore")["update_interval"] == 100
    assert arguments("galore@rank=8,side=long") == arguments("galore") | {"rank": 8, "side": "long"}
    assert arguments("adamw@b2=0.95")["b2"] == 0.95


def test_the_recipe_is_what_users_get(tmp_path):
    run = Run(method="natural-galore", learning_rate=0.01, root=tmp_path)
    used = prepare(run).configuration["arguments"]
    of_the_setting = {"learning_rate", "rank", "update_interval", "seed", "weight_decay", "mask"}
    of_the_setting |= {"unprojected_ratio"}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(ng.natural_galore_adamw).parameters.items()
        if name not in of_the_setting and not callable(parameter.default)
    }
    assert "scale" in defaults and {name: used[name] for name in defaults} == defaults


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "sgd"], "method must be one of adamw"),
        (["--method", "adamw@rank=3"], "adamw has no argument 'rank'"),
        (["--method", "adamw@"], "adamw has no argument ''"),
        (["--method", "galore@method=magic"], "galore@method=magic: "),
        (["--method", "adamw", "--corpus", "tales"], "corpus must be one of sotu"),
        (["--method", "adamw", "--accumulate", "3"], "accumulate must divide the 2 rows"),
        (["--method", "adamw", "--rows", "0"], "rows must be at least 1, got 0"),
        (["--method", "adamw", "--steps", "0"], "steps must be at least 1"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, options, message):
    start = ["run", "--preset", "tiny", "--learning-rate", "0.01", "--root", str(tmp_path)]
    assert main([*start, *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_sweep_names_what_it_cannot_do(tmp_path, capsys):
    start = ["sweep", "--root", str(tmp_path), "--methods", "adamw"]
    for more, message in [
        ([], "adamw has no tuned rates at nano"),
        (["--learning-rates", "fast"], "a learning rate is a number or 'tuned'"),
        (["--learning-rates", "tuned", "0.1"], "'tuned' is the only learning rate"),
        (["--ratios", "2"], "with 'tuned' learning rates, ratios are tuned too"),
        (["--search", "--learning-rates", "1"], "a search takes neither learning_rates nor ratios"),
        (["--search", "--budget", "0"], "budget must be at least 1"),
        (["--learning-rates", "0.1", "--workers", "0"], "workers must be at least 1"),
        (["--learning-rates", "0.1", "--methods", "sgd"], "method must be one of"),
    ]:
        assert main([*start, *more]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_muon_is_for_hidden_matrices_alone():
    params = {"embed": {"embedding": jnp.ones((6, 8))}, "mlp": {"kernel": jnp.ones((8, 4))}}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
    tx, adamw = muon(0.1), optax.adamw(0.1, weight_decay=0.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = adamw.update(grads, adamw.init(params), params)
    np.testing.assert_allclose(
        updates["embed"]["embedding"], expected["embed"]["embedding"], rtol=1e-6
    )
    # An orthogonal matrix of rank 4 at the root mean square 0.2 · 0.1: all singular values are
    # near 0.02 · sqrt(8), as Newton-Schulz leaves them.
    values = np.linalg.svd(updates["mlp"]["kernel"], compute_uv=False)
    np.testing.assert_allclose(values, 0.02 * np.sqrt(8), rtol=0.4)


def test_presets_are_complete():
    for name in ("nano", "9m", "60m"):
        preset = PRESETS[name]
        assert preset.model == MODEL_PRESETS[name] and preset.seq_len <= preset.model.max_length
        assert preset.rank * 4 == preset.model.hidden
    for width in (128, 256, 512):
        nano, wider = PRESETS["nano"], PRESETS[f"width-{width}"]
        assert wider.model.hidden == width and wider.model.layers == nano.model.layers
        assert wider.model.head_dim == nano.model.head_dim and wider.rank * 4 == width
        assert wider.model.vocab_size == nano.model.vocab_size
    paper = PRESETS["60m"]
    assert (paper.rows, paper.seq_len, paper.update_interval) == (512, 256, 200)


def test_excerpt_is_spread_over_the_whole():
    tokens = np.arange(1000)
    some = excerpt(tokens, 100, 20)
    assert len(some) == 100 and some[0] == 0 and some[-1] == 999
    assert (np.diff(some) == 1).sum() == 5 * 19  # five segments
    np.testing.assert_array_equal(excerpt(tokens, 990, 20), tokens)


def test_thinned_losses_are_means_of_windows():
    records = [{"step": i, "loss": float(i)} for i in range(1, 11)]
    assert thinned(records, 5) == [[2, 1.5], [4, 3.5], [6, 5.5], [8, 7.5], [10, 9.5]]
    assert thinned(records, 4) == [[3, 2.0], [6, 5.0], [9, 8.0], [10, 10.0]]
    assert len(thinned(records, 50)) == 10


def test_chosen_arguments_are_values():
    changes = choose("galore@rank=16,side=long,stagger=True,scale=0.5").changes
    assert changes == {"rank": 16, "side": "long", "stagger": True, "scale": 0.5}
    with pytest.raises(ConfigError, match="no argument 'learning_rate'"):
        choose("galore@learning_rate=1")
