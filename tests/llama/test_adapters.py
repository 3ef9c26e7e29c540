"""Low-rank weights against compositions in NumPy, and runs that train them."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run as tiny
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.common.lora import partition, union
from examples.common.optimizers import OptimizerConfig
from examples.llama.__main__ import main
from examples.llama.loop import train
from examples.llama.model.adapters import AdapterConfig, make_linear
from examples.llama.model.config import MODEL_PRESETS
from examples.llama.model.llama import INIT_STD, dense
from examples.llama.run_config import RunConfig
from examples.llama.training.build import abstract_run
from examples.llama.training.train_step import make_model

pytestmark = pytest.mark.usefixtures("fast_compile")

RANK, ALPHA = 4, 6.0
KINDS = ("factorised", "lora", "relora")
# Two layers of 16 x 16 (q, o), 16 x 8 (k, v), 16 x 24 (gate, up) and 24 x 16 (down).
MATRICES = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
ADAPTERS = 2 * RANK * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24))
OTHERS = 2 * 48 * 16 + 5 * 16  # embedding and head, norms


def adapter(kind, **changes):
    values: dict[str, Any] = {"rank": RANK}
    if kind != "factorised":
        values["alpha"] = ALPHA
    if kind == "relora":
        values |= {"merge_every": 3, "restart_warmup": 1}
    return AdapterConfig(kind=kind, **{**values, **changes})


def run_config(kind, **changes):
    adamw = OptimizerConfig(name="adamw")
    return tiny.run_config(**{"optimizer": adamw, "adapter": adapter(kind), **changes})


def lively(weights):
    """Weights, B included, large enough to matter in the logits."""
    flat = flatten_dict(weights)
    for i, (path, leaf) in enumerate(flat.items()):
        if "norm" not in str(path):
            flat[path] = 0.3 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
    return unflatten_dict(flat)


def composed(weights, scale):
    """Full kernels by layer, W0 + scale A B or A B, in float64."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(weights).items()}
    kernels = {}
    for path, A in flat.items():
        if path[-1] == "lora_a":
            product = A @ flat[(*path[:-1], "lora_b")]
            if path[-2] == "lora":
                layer = path[:-2]
                kernels[layer] = flat[(*layer, "base", "kernel")] + scale * product
            else:
                kernels[path[:-1]] = product
    return kernels


def with_kernels(weights, kernels):
    """Weights of a model without adapters that has these kernels."""
    flat = flatten_dict(weights)
    rest = {p: v for p, v in flat.items() if not {"lora", "base", "lora_a", "lora_b"} & set(p)}
    dense_kernels = {(*p, "kernel"): jnp.asarray(K, jnp.float32) for p, K in kernels.items()}
    return unflatten_dict({**rest, **dense_kernels})


def tokens(rows=3, length=8):
    return jax.random.randint(jax.random.key(5), (rows, length), 0, tiny.VOCAB)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", ["factorised", "lora"])
def test_logits_are_those_of_the_composed_weights(kind, stacked):
    model = dataclasses.replace(tiny.MODEL, stacked=stacked)
    apply, weights = make_model(model, 0, make_linear(adapter(kind)))
    weights = lively(weights)
    plain, first = make_model(model, 0)
    expected_weights = with_kernels(weights, composed(weights, ALPHA / RANK))
    assert jax.tree.map(jnp.shape, expected_weights) == jax.tree.map(jnp.shape, first)
    expected = plain(expected_weights, tokens())
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(apply(weights, tokens()), expected, rtol=0, atol=2e-5)


def test_a_layer_in_bfloat16():
    config = dataclasses.replace(tiny.MODEL, dtype="bfloat16", param_dtype="bfloat16")
    layer = make_linear(adapter("lora"))(16, 24, config, nnx.Rngs(0, adapter=1))
    layer.lora.lora_b[...] = jnp.ones_like(layer.lora.lora_b[...])
    x = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    X, W0, A, B = (
        np.asarray(v, np.float64)
        for v in (x, layer.base.kernel[...], layer.lora.lora_a[...], layer.lora.lora_b[...])
    )
    expected = X @ W0 + ALPHA / RANK * X @ A @ B
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=0.1)
    assert np.abs(expected).max() > 2


@pytest.mark.parametrize("stacked", [False, True])
def test_lora_starts_as_the_model_without_it(stacked):
    model = dataclasses.replace(tiny.MODEL, stacked=stacked)
    apply, weights = make_model(model, 3, make_linear(adapter("lora")))
    plain, first = make_model(model, 3)
    trained, frozen = partition(weights)
    for path, W0 in flatten_dict(frozen).items():
        np.testing.assert_array_equal(W0, flatten_dict(first)[(*path[:-2], "kernel")])
    np.testing.assert_array_equal(apply(weights, tokens()), plain(first, tokens()))
    flat = flatten_dict(trained)
    assert not any(jnp.any(leaf) for path, leaf in flat.items() if path[-1] == "lora_b")
    As = [np.asarray(leaf).ravel() for path, leaf in flat.items() if path[-1] == "lora_a"]
    assert len({A.tobytes() for A in As}) == len(As)


@pytest.mark.parametrize("stacked", [False, True])
def test_variances_at_the_start(stacked):
    model = dataclasses.replace(MODEL_PRESETS["nano"], layers=2, stacked=stacked)
    _, weights = make_model(model, 0, make_linear(adapter("factorised", rank=64)))
    kernels = composed(weights, 1.0)
    assert len(kernels) == (7 if stacked else 14)
    for kernel in kernels.values():
        assert np.std(kernel) == pytest.approx(INIT_STD, rel=0.1)
        assert abs(np.mean(kernel)) < 0.1 * INIT_STD
    _, weights = make_model(model, 0, make_linear(adapter("lora", rank=64)))
    for path, A in flatten_dict(weights).items():
        if path[-1] == "lora_a":
            assert np.std(A) == pytest.approx((2 / A.shape[-2]) ** 0.5, rel=0.05)


def test_partition_and_union():
    _, weights = make_model(tiny.MODEL, 0, make_linear(adapter("lora")))
    trained, frozen = partition(weights)
    assert {path[-1] for path in flatten_dict(frozen)} == {"kernel"}
    assert set(flatten_dict(trained)).isdisjoint(flatten_dict(frozen))
    jax.tree.map(np.testing.assert_array_equal, union(trained, frozen), weights)
    for make in (dense, make_linear(adapter("factorised"))):
        _, weights = make_model(tiny.MODEL, 0, make)
        trained, frozen = partition(weights)
        assert frozen == {}
        jax.tree.map(np.testing.assert_array_equal, trained, weights)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trained_has_state(kind):
    found = abstract_run(run_config(kind))
    assert count(found.params) == ADAPTERS + OTHERS
    assert count(found.state.frozen) == (0 if kind == "factorised" else MATRICES)
    report = ng.memory_report(found.tx, found.params)
    moments = 2 * 4 * (ADAPTERS + OTHERS)
    assert report.total_state_bytes - report.shared_bytes == moments
    of_state = (x.size * x.dtype.itemsize for x in jax.tree.leaves(found.state.opt_state))
    assert sum(of_state) < moments + 20


@pytest.mark.parametrize("kind", ["factorised", "lora"])
def test_frozen_weights_stay_and_all_others_move(kind):
    config = run_config(kind, steps=3)
    weights = make_model(config.model, config.seed, make_linear(config.adapter))[1]
    first, frozen = partition(weights)
    result = train(config, splits=tiny.splits())
    assert result.steps == 3
    jax.tree.map(np.testing.assert_array_equal, result.state.frozen, frozen)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), first, result.params)
    assert jax.tree.all(moved)
    logits = result.apply(result.weights, tokens())
    assert jnp.any(logits != result.apply(weights, tokens()))


def test_a_given_optimizer_sees_only_what_is_trained():
    config = run_config("lora", steps=2)
    weights = make_model(config.model, config.seed, make_linear(config.adapter))[1]
    expected = jax.tree.structure(partition(weights)[0])
    seen = []

    def update(updates, state, params):
        seen.extend([jax.tree.structure(updates), jax.tree.structure(params)])
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    tx = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    result = train(config, splits=tiny.splits(), tx=tx)
    assert result.finished
    assert seen
    assert set(seen) == {expected}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "adapter.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "adapter.alpha must be positive, got 0.0"),
        ({"alpha": float("nan")}, "adapter.alpha must be positive, got nan"),
        ({"merge_every": 0}, "adapter.merge_every must be at least 1, got 0"),
        ({"restart_warmup": -1}, "adapter.restart_warmup must be at least 0 .* got -1"),
        ({"restart_warmup": 3}, "below adapter.merge_every=3, got 3"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        adapter("relora", **changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("none", {"rank": 5}, "adapter.rank=5 has no effect with adapter.kind='none', only with f"),
        ("factorised", {"alpha": 5.0}, "adapter.alpha=5.0 .* only with lora or relora"),
        ("lora", {"merge_every": 5}, "adapter.merge_every=5 .* only with relora"),
    ],
)
def test_options_of_other_kinds_are_refused(kind, changes, message):
    AdapterConfig(kind=kind)
    with pytest.raises(ValueError, match=message):
        AdapterConfig(kind=kind, **changes)


def test_a_rank_that_no_matrix_has_is_refused():
    # Keys and values have one head of 8.
    with pytest.raises(ConfigError, match=r"adapter\.rank=9 is larger .* matrices, 8"):
        run_config("lora", adapter=adapter("lora", rank=9))
    run_config("lora", adapter=adapter("lora", rank=8))


def test_runs_of_different_kinds_have_different_directories():
    names = {RunConfig(adapter=AdapterConfig(kind=kind)).run_dir.name for kind in ("none", *KINDS)}
    assert len(names) == 4
    assert "nano-natural-galore" in names


@pytest.fixture
def arguments(tmp_path):
    """Options for three steps on a small text, with all files in a directory of the test."""
    text = tmp_path / "text.jsonl"
    words = ["we", "the", "people", "of", "the", "more", "perfect", "union"]
    lines = (" ".join(words[i % 8] for i in range(start, start + 20)) for start in range(100))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    places = {"data": text, "root": tmp_path, "cache-dir": tmp_path / "cache", "name": "run"}
    sizes = {"vocab-size": 270, "seq-len": 16, "batch-size": 2, "steps": 3, "optimizer": "adamw"}
    model = {"hidden": 16, "intermediate": 24, "layers": 2, "heads": 2, "kv-heads": 1}
    options = {**places, **sizes, **{f"model.{name}": size for name, size in model.items()}}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("kind", ["factorised", "relora"])
def test_the_program_trains_it(arguments, tmp_path, capsys, kind):
    merges = ["--adapter.merge-every", "2", "--adapter.restart-warmup", "1"]
    more = ["--adapter.kind", kind, "--adapter.rank", "4", *(merges if kind == "relora" else [])]
    assert main([*arguments, *more]) == 0, capsys.readouterr().err
    assert f"trained ({kind})" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    frozen = 0 if kind == "factorised" else MATRICES
    assert summary["parameters"] - summary["trained_parameters"] == frozen
    moments = 8 * summary["trained_parameters"]
    assert 0 <= summary["optimizer_bytes"] - moments < 20
    assert main([*arguments, *more, "--resume", "--adapter.rank", "2"]) == 1
    assert "adapter.rank: 4 -> 2" in capsys.readouterr().err


def test_the_program_explains_a_bad_rank(arguments, capsys):
    assert main([*arguments, "--adapter.kind", "lora", "--adapter.rank", "99"]) == 1
    assert "adapter.rank=99 is larger than" in capsys.readouterr().err
