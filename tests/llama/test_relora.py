"""Merges: what they keep, what they start anew, and runs that are stopped around them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run as tiny
from flax.traverse_util import flatten_dict, unflatten_dict

import natgalore_jax as ng
from examples.common.errors import ConfigError
from examples.common.lora import partition, union
from examples.common.metrics import of_kind
from examples.common.optimizers import OptimizerConfig
from examples.common.train_state import TrainState, init_state
from examples.llama.loop import train
from examples.llama.model.adapters import AdapterConfig, make_linear
from examples.llama.run_config import differences
from examples.llama.training.faults import FaultConfig, Guard
from examples.llama.training.relora import make_merge, merge, restart_factor, with_restarts
from examples.llama.training.train_step import make_model

pytestmark = pytest.mark.usefixtures("fast_compile")

ADAPTER = AdapterConfig(kind="relora", rank=4, alpha=6.0, merge_every=3, restart_warmup=1)
LORA = AdapterConfig(kind="lora", rank=4, alpha=6.0)


def run_config(**changes):
    defaults = {"optimizer": OptimizerConfig(name="adamw"), "adapter": ADAPTER}
    return tiny.run_config(**{**defaults, **changes})


def model(stacked=True, **changes):
    """The model and (trained, frozen) weights with a B that is not zero."""
    config = dataclasses.replace(tiny.MODEL, stacked=stacked, **changes)
    apply, weights = make_model(config, 0, make_linear(ADAPTER))
    flat = flatten_dict(weights)
    for i, (path, leaf) in enumerate(flat.items()):
        if path[-1] in ("lora_b", "kernel"):
            flat[path] = 0.3 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
    return apply, *partition(unflatten_dict(flat))


def parts(tree, name):
    return {path: np.asarray(v) for path, v in flatten_dict(tree).items() if path[-1] == name}


def assert_merged(before, after):
    """`after` has W0 + scale A B of `before`, the (trained, frozen) weights, in float64."""
    (params, frozen), (new_params, new_frozen) = before, after
    for path, W0 in parts(frozen, "kernel").items():
        A, B = (
            parts(params, name)[(*path[:-2], "lora", name)].astype(np.float64)
            for name in ("lora_a", "lora_b")
        )
        expected = W0 + ADAPTER.alpha / ADAPTER.rank * np.einsum("...ir,...ro->...io", A, B)
        np.testing.assert_allclose(flatten_dict(new_frozen)[path], expected, rtol=0, atol=1e-6)
    assert not any(B.any() for B in parts(new_params, "lora_b").values())


@pytest.mark.parametrize("stacked", [False, True])
def test_a_merge_keeps_the_function(stacked):
    apply, params, frozen = model(stacked)
    new_params, new_frozen = jax.jit(merge)(params, frozen, ADAPTER.scale, jax.random.key(0))
    assert_merged((params, frozen), (new_params, new_frozen))

    rows = jax.random.randint(jax.random.key(5), (3, 8), 0, tiny.VOCAB)
    expected = apply(union(params, frozen), rows)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(
        apply(union(new_params, new_frozen), rows), expected, rtol=0, atol=2e-5
    )
    # The product took part: without it the function is another one.
    assert np.abs(apply(union(new_params, frozen), rows) - expected).max() > 0.1

    for path, A in parts(new_params, "lora_a").items():
        assert not np.any(parts(params, "lora_a")[path] == A)
        assert np.abs(A).max() <= (6 / A.shape[-2]) ** 0.5
        assert np.abs(A).max() > 0.9 * (6 / A.shape[-2]) ** 0.5
    news = [A.ravel()[:8].tobytes() for A in parts(new_params, "lora_a").values()]
    assert len(set(news)) == len(news)
    untouched = [p for p in flatten_dict(params) if "lora" not in p]
    for path in untouched:
        np.testing.assert_array_equal(flatten_dict(new_params)[path], flatten_dict(params)[path])


def test_a_merge_keeps_dtypes():
    _, params, frozen = model(param_dtype="bfloat16", dtype="bfloat16")
    for old, new in zip(
        (params, frozen), merge(params, frozen, ADAPTER.scale, jax.random.key(0)), strict=True
    ):
        assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, old)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-2, weight_decay=0.1)),
        optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(),
    ],
)
def test_what_the_optimizer_keeps_for_adapters_starts_anew(tx):
    _, params, frozen = model()
    state = init_state(params, tx, frozen)
    step = jax.jit(tx.update)
    opt_state = state.opt_state
    for _ in range(2):
        _, opt_state = step(jax.tree.map(jnp.ones_like, params), opt_state, params)
    before = jax.device_get(opt_state)
    state = TrainState(params, opt_state, jnp.int32(2), state.totals, frozen)

    merged = make_merge(ADAPTER, tx, params, seed=0)(state)
    leaves = jax.tree.leaves_with_path(merged.opt_state)
    old = dict(jax.tree.leaves_with_path(before))
    of_adapters = [path for path, _ in leaves if "'lora'" in jax.tree_util.keystr(path)]
    assert 0 < len(of_adapters) < len(leaves)
    assert any(np.any(old[path]) for path in of_adapters)
    for path, leaf in leaves:
        expected = np.zeros_like(old[path]) if path in of_adapters else old[path]
        np.testing.assert_array_equal(leaf, expected)
        assert leaf.dtype == old[path].dtype


def test_a_basis_is_not_started_anew():
    _, params, _ = model()
    tx = ng.galore_adamw(1e-2, rank=2)
    with pytest.raises(ConfigError, match=r"such as --optimizer adamw; this one projects layers"):
        make_merge(ADAPTER, tx, params, seed=0)
    make_merge(LORA, tx, params, seed=0)


def test_restart_factors():
    config = AdapterConfig(kind="relora", rank=4, merge_every=10, restart_warmup=3)
    expected = {0: 1, 1: 1, 9: 1, 10: 0.25, 11: 0.5, 12: 0.75, 13: 1, 19: 1, 20: 0.25, 23: 1}
    for step, value in expected.items():
        assert float(restart_factor(config, step)) == pytest.approx(value), step
    config = dataclasses.replace(config, restart_warmup=0)
    assert all(float(restart_factor(config, step)) == 1 for step in range(25))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_restarts_multiply_the_updates_of_a_given_optimizer(accumulate):
    tx, schedule = with_restarts(ADAPTER, optax.sgd(2.0), None, accumulate)
    assert schedule is None
    state, updates = tx.init(jnp.ones(())), []
    for _ in range(8 * accumulate):
        update, state = tx.update(jnp.ones(()), state)
        updates.append(float(update))
    expected = [-2.0, -2.0, -2.0, -1.0, -2.0, -2.0, -1.0, -2.0]
    assert updates == list(np.repeat(expected, accumulate))


def test_without_merges_nothing_is_restarted():
    tx, lora = optax.sgd(1.0), LORA
    schedule = optax.constant_schedule(1.0)
    assert with_restarts(lora, tx, schedule, 1) == (tx, schedule)


@pytest.fixture(scope="module")
def whole(fast_compile):
    return {a: train(run_config(accumulate=a), splits=tiny.splits()) for a in (1, 2)}


def test_a_run_is_lora_up_to_the_merge_and_restarts_there(whole):
    """Eight steps with merges after 3 and 6."""
    config = run_config()
    lora = dataclasses.replace(config, adapter=LORA)
    runs = (whole[1], train(lora, splits=tiny.splits()))
    rates = [[r["learning_rate"] for r in of_kind(run.records, "train")] for run in runs]
    np.testing.assert_allclose(np.divide(*rates), [1, 1, 1, 0.5, 1, 1, 0.5, 1], rtol=1e-6)
    losses = [[r["loss"] for r in of_kind(run.records, "train")] for run in runs]
    # The loss of step 4 is of the merged model, which is the same function.
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][3] == pytest.approx(losses[1][3], rel=1e-5)
    assert losses[0][5] != losses[1][5]

    merged, stopped = (
        train(c, splits=tiny.splits(), should_stop=tiny.after(3)).state for c in (config, lora)
    )
    assert_merged((stopped.params, stopped.frozen), (merged.params, merged.frozen))


def test_there_is_no_merge_after_the_last_step():
    result = train(run_config(steps=3), splits=tiny.splits())
    assert result.finished
    assert all(B.any() for B in parts(result.params, "lora_b").values())


@pytest.mark.parametrize(
    ("accumulate", "stops"),
    [(1, [2, 1, 1]), (2, [5, 1, 1])],
)
def test_resume_across_a_merge_is_exact(tmp_path, whole, accumulate, stops):
    """Stopped before, at and after merges, and inside an accumulation."""
    config = run_config(accumulate=accumulate, output={"save_every": 100, "resume": True})
    for batches in stops:
        part = train(
            config, splits=tiny.splits(), run_dir=tmp_path, should_stop=tiny.after(batches)
        )
        assert not part.finished
    result = train(config, splits=tiny.splits(), run_dir=tmp_path)

    expected = whole[accumulate]
    tiny.assert_same_bits(result.state, expected.state)
    losses = [[(r["kind"], r["step"], r["loss"]) for r in x.records] for x in (result, expected)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 2), ("alpha", 1.0), ("merge_every", 4), ("restart_warmup", 0)],
)
def test_another_adapter_is_another_configuration(field, value):
    config = run_config()
    other = dataclasses.replace(config, adapter=dataclasses.replace(ADAPTER, **{field: value}))
    changed = differences(config.to_dict(), other.to_dict())
    assert changed == [f"adapter.{field}: {getattr(ADAPTER, field)} -> {value}"]


def test_a_merge_leaves_the_state_where_it_is():
    _, params, frozen = model()
    tx, mesh = optax.adamw(1e-2), jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    state = init_state(params, tx, frozen)

    def place(x):
        rows = jax.P(*[None] * (x.ndim - 2), "data") if x.ndim > 1 else jax.P()
        return jax.NamedSharding(mesh, rows)

    state_at = jax.tree.map(place, state)
    merged = make_merge(ADAPTER, tx, params, 0, state_at)(jax.device_put(state, state_at))
    assert jax.tree.map(lambda x: x.sharding, merged) == state_at
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(merged))


def test_a_rollback_keeps_the_merge_of_an_extended_run(tmp_path, monkeypatch):
    """The run of 6 steps ended before its merge; the longer one has a spike after it."""
    adapter = dataclasses.replace(ADAPTER, merge_every=6)
    faults = FaultConfig(rollback_on_spike=5.0)
    short = run_config(adapter=adapter, steps=6, faults=faults)
    train(short, splits=tiny.splits(), run_dir=tmp_path)
    spikes = iter([False, True])
    monkeypatch.setattr(Guard, "is_spike", lambda *_: next(spikes, False))
    output = dataclasses.replace(short.output, resume=True, save_every=100)
    longer = dataclasses.replace(short, steps=9, output=output)
    result = train(longer, splits=tiny.splits(), run_dir=tmp_path)
    assert of_kind(result.records, "rollback")
    first = train(run_config(adapter=adapter, steps=1), splits=tiny.splits())
    for before, after in zip(
        *map(jax.tree.leaves, (first.state.frozen, result.state.frozen)), strict=True
    ):
        assert np.any(before != after)
