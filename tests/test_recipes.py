"""Every program of examples/recipes, run as it is."""

import functools
import importlib
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted(
    path.stem for path in (ROOT / "examples/recipes").glob("*.py") if path.stem != "__init__"
)

pytestmark = pytest.mark.usefixtures("fast_compile")


TRAINERS = {"tunix_trainer": "tunix", "maxtext_trainer": "maxtext"}  # which no extra installs


@functools.cache
def outcome(name):
    if package := TRAINERS.get(name):
        pytest.importorskip(package, reason=f"{package} is not installed: docs/recipes.md")
    return importlib.import_module(f"examples.recipes.{name}").main()


def moments(state, *names):
    """The first moments of the parameter of these names."""
    return functools.reduce(lambda tree, name: tree[name], names, optax.tree.get(state, "mu"))


def test_the_page_lists_every_recipe_once():
    links = re.findall(
        r"\(\.\./examples/recipes/(\w+)\.py\)", (ROOT / "docs/recipes.md").read_text()
    )
    assert sorted(links) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(name, capsys):
    results = outcome(name)
    for losses, *_ in results.values() if isinstance(results, dict) else [results]:
        assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]
    # Python would find a script named like a package instead of the package.
    assert importlib.util.find_spec(name) is None


@pytest.mark.parametrize("name", ["flax_linen", "plain_pytrees", "inject_hyperparams"])
def test_moments_are_low_rank(name):
    index = 1 if name == "inject_hyperparams" else 2
    mu = optax.tree.get(outcome(name)[index], "mu")
    assert {x.shape for x in jax.tree.leaves(mu) if x.ndim > 1} == {(4, 64), (64, 4)}


def test_flax_nnx():
    _, _, optimizer = outcome("flax_nnx")
    mu = optax.tree.get(optimizer.opt_state, "mu")
    assert mu["up"]["kernel"].shape == (4, 64) and mu["down"]["kernel"].shape == (64, 4)


def test_sharded_nnx_spreads_weights_and_state():
    _, params, state = outcome("flax_nnx_sharded")
    for name, shape, spec in (
        ("up", (4, 64), jax.P(None, "model")),
        ("down", (64, 4), jax.P("model", None)),
    ):
        mu = moments(state, name, "kernel")
        assert mu.shape == shape
        for x in (mu, params[name]["kernel"]):
            expected = jax.NamedSharding(x.sharding.mesh, spec)
            assert x.sharding.is_equivalent_to(expected, 2) and len(x.sharding.device_set) == 8


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_resumes_with_the_state_in_its_shards(name):
    losses, result = outcome(name)
    assert len(losses) == 8 and losses[4] < losses[3]  # the second call went on
    optimizer = result.optimizer  # of Tunix's trainer, and in MaxText's state
    arrays = jax.tree.leaves(optimizer)
    assert {int(x) for x in arrays if x.shape == () and x.dtype == jnp.uint32} == {8}
    bases = jax.tree.leaves(optax.tree.get(optimizer.opt_state, "basis"))
    assert bases
    for x in bases:
        assert x.shape[-1] == 4
        assert x.sharding.shard_shape(x.shape) != x.shape or len(x.sharding.device_set) == 1


def test_equinox_has_weights_of_outputs_times_inputs():
    _, model, state = outcome("equinox_mlp")
    layers = optax.tree.get(state, "mu").layers
    assert model.layers[0].weight.shape == (64, 16) and layers[0].weight.shape == (64, 4)


def test_accumulators_of_multi_steps():
    full, low = (
        {x.shape for x in jax.tree.leaves(optax.tree.get(state, "acc_grads"))}
        for _, _, state in outcome("multi_steps").values()
    )
    assert full == {(16, 64), (64, 16)} and low == {(4, 64), (64, 4)}


def test_injected_numbers_were_changed_without_compiling():
    _, state, train_step = outcome("inject_hyperparams")
    assert float(state.hyperparams["learning_rate"]) == np.float32(2e-3)
    assert float(state.hyperparams["weight_decay"]) == np.float32(0.1)
    assert train_step._cache_size() == 1


def test_ranks_differ_by_layer():
    _, _, state = outcome("rank_per_layer")
    shapes = [
        x.shape for _, mu in optax.tree.get_all_with_path(state, "mu") for x in jax.tree.leaves(mu)
    ]
    assert sorted(shapes) == [(2, 16)] * 2 + [(8, 64)] * 2 + [(64,)] * 2


def test_frozen_layers_stay_and_have_no_state():
    _, params, state = outcome("freezing")
    start = importlib.import_module("examples.recipes.freezing").init(jax.random.key(1))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, params)
    for name, flags in moved.items():
        assert set(flags.values()) == {name == "layer_2"}
    # Two moments and a basis of one matrix, and two moments of one bias.
    matrices = [x.shape for x in jax.tree.leaves(state) if x.ndim == 2]
    assert sorted(matrices) == [(8, 32), (8, 32), (32, 8)]


def test_master_copy_is_float32_and_the_model_bfloat16():
    _, master, state = outcome("mixed_precision")
    assert {x.dtype for x in jax.tree.leaves(master)} == {jnp.dtype("float32")}
    assert moments(state, "up").dtype == jnp.bfloat16
    assert optax.tree.get(state, "nu")["up"].dtype == jnp.float32
    assert optax.tree.get(state, "basis")[0]["up"].dtype == jnp.bfloat16
    loss_fn = importlib.import_module("examples.recipes.mixed_precision").loss_fn
    weights = optax.tree.cast(master, jnp.bfloat16)
    x = jnp.ones((2, 16), jnp.bfloat16)
    loss, grads = jax.eval_shape(jax.value_and_grad(loss_fn), weights, x, jnp.ones((2, 16)))
    assert loss.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}


def test_scan_took_all_steps():
    losses, _, state = outcome("scan_over_steps")
    assert len(losses) == 40 and int(state[0].count) == 40


def test_tucker_has_a_rank_for_each_axis():
    _, _, state = outcome("tucker_convolution")
    shapes = [x.shape for x in jax.tree.leaves(state) if x.ndim == 4]
    assert shapes == [(3, 3, 4, 4)] * 2  # both moments of the kernel


def test_long_matrices_of_the_unet():
    """144 × 16: the outputs are the shorter side, and only that is projected."""
    _, _, state = outcome("diffusion_unet")
    assert moments(state, "middle", "kernel").shape == (3, 3, 16, 8)
    bases = optax.tree.get(state, "basis")[1]
    projected = [name for name in bases if bases[name]["kernel"] != optax.MaskedNode()]
    assert sorted(projected) == ["down", "middle"]


def test_attention_of_the_vision_transformer():
    _, _, state = outcome("vision_transformer")
    attention = moments(state, "block", "attention")
    assert attention["query"]["kernel"].shape == (4, 2, 8)
    assert attention["out"]["kernel"].shape == (4, 16)
    assert moments(state, "patch_embed", "kernel").shape == (4, 4, 3, 16)
    assert moments(state, "head", "kernel").shape == (16, 3)
