"""Errors of per-layer updates, before anything is computed."""

import jax
import jax.numpy as jnp
import optax
import pytest
from per_layer_model import D, F, L, batches, embed, head, init_params, layer

import natgalore_jax as ng


def norm_in_state():
    """Leaves updates alone and remembers how large they were."""

    def update(updates, state, params=None):
        del params, state
        return updates, optax.tree.norm(updates)

    return optax.GradientTransformation(lambda params: jnp.zeros([]), update)


def test_an_optimizer_that_mixes_parameters_is_refused():
    params = init_params()
    for tx, culprit in [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), r"depends on .*clip_norm"),
        (optax.apply_if_finite(optax.sgd(0.1), 3), r"depends on"),
        (norm_in_state(), r"optimizer's state depends on embed/table"),
    ]:
        train = ng.training.per_layer(tx, embed, layer, head)
        with pytest.raises(ValueError, match=culprit):
            train.step(params, train.init(params), batches(1)[0])


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"layers": {}}, {}, "without any leaves"),
        ({"layers": {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4))}}, {}, r"layers/b \(2, 4\)"),
        ({"layers": {"a": jnp.ones(())}}, {}, "leading axis"),
        ({}, {"layers": "blocks"}, "layers='blocks' selects nothing"),
        (
            {"layers": {"gain": jnp.ones((8, D)), "up": jnp.ones((8, D, F))}},
            {},
            r"layers/gain: axis 0 of \(8, 12\), the layer axis",
        ),
    ],
)
def test_a_stack_that_cannot_be_taken_apart_is_refused(change, settings, message):
    train = ng.training.per_layer(ng.galore_adamw(0.1, rank=4), embed, layer, head, **settings)
    with pytest.raises(ValueError, match=message):
        train.init(init_params() | change)


def test_layers_that_share_the_scales_of_8_bits_are_refused():
    params = init_params() | {"layers": {"gain": jnp.ones((80, D))}}
    train = ng.training.per_layer(optax.sgd(0.1), embed, layer, head)
    with pytest.raises(ValueError, match=r"layers/gain: layers share the scales .*\(80, 12\)"):
        train.init(ng.training.quantize_weights(params, where=True))


def test_a_dtype_of_decoded_weights_needs_weights_in_8_bits():
    train = ng.training.per_layer(optax.sgd(0.1), embed, layer, head, weight_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="weight_dtype has no effect on parameters that are not"):
        train.init(init_params())
    state = train.init(ng.training.quantize_weights(init_params()))
    with pytest.raises(ValueError, match="weight_dtype has no effect on parameters that are not"):
        train.step(init_params(), state, batches(1)[0])


def test_one_shape_may_be_that_of_several_parameters():
    w = jax.ShapeDtypeStruct((2, D, D), jnp.float32)
    train = ng.training.per_layer(optax.adam(0.1), embed, layer, head)
    state = train.init({"layers": {"up": w, "down": w}})
    assert state.opt_state[0].mu["layers"]["up"].shape == w.shape


def test_an_optimizer_that_treats_one_layer_otherwise_is_refused():
    def where(path, leaf):
        return "down" in path or ("up" in path and leaf.size > 300)

    tx = ng.galore_adamw(0.1, rank=4, where=where)
    with pytest.raises(ValueError, match=r"one layer differently from the stack.*layers/up"):
        ng.training.per_layer(tx, embed, layer, head).init(init_params())


@pytest.mark.parametrize(
    "tx",
    [
        ng.natural_galore_adamw(0.1, rank=2),  # projects it
        ng.natural_galore_adamw(0.1, rank=4),  # clips it
        optax.chain(optax.scale_by_adam(), ng.clip_leading_singular_value()),
        ng.contrib.scale_sgd(0.1),
        ng.contrib.racs_adamw(0.1),
    ],
    ids=["projected", "clipped", "clipped outside", "scale", "racs"],
)
def test_vectors_whose_stack_counts_as_one_matrix_are_refused(tx):
    params = init_params()
    params["layers"]["v"] = jnp.ones((L, D))  # no name of a vector
    with pytest.raises(ValueError, match=r"layers/v: axis 0 of \(\d+, \d+\), the layer axis"):
        ng.training.per_layer(tx, embed, layer, head).init(params)


@pytest.mark.parametrize(
    ("error", "settings"),
    [
        (TypeError, {"tx": None}),
        (TypeError, {"embed": 3}),
        (TypeError, {"layers": 0}),
        (ValueError, {"clip_norm": 0.0}),
        (ValueError, {"clip_mode": "global"}),
        (ValueError, {"accumulate": 0}),
        (TypeError, {"accumulate": 2}),
        (ValueError, {"accumulate": 2, "tx": ng.galore_adamw(0.1, residual="fira")}),
    ],
)
def test_arguments_are_checked(error, settings):
    arguments = {"tx": optax.sgd(0.1), "embed": embed, "layer": layer, "head": head} | settings
    with pytest.raises(error):
        ng.training.per_layer(**arguments)


def test_a_wrong_state_and_a_loss_that_is_no_scalar_are_refused():
    params, batch = init_params(), batches(1)[0]
    train = ng.training.per_layer(optax.adam(0.1), embed, layer, head)
    other = ng.training.per_layer(optax.sgd(0.1), embed, layer, head)
    with pytest.raises(ValueError, match="from init of the same per_layer"):
        train.step(params, other.init(params), batch)
    vector = ng.training.per_layer(optax.sgd(0.1), embed, layer, lambda params, x, batch: x)
    with pytest.raises(ValueError, match=r"scalar loss, got float32 of shape \(4, 6, 12\)"):
        vector.step(params, vector.init(params), batch)
