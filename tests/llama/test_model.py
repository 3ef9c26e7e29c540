import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_weights import CASES, SMALL, arrays, stack_layers, weights

from examples.llama.model.config import MODEL_PRESETS, parameter_count
from examples.llama.model.llama import Llama, unstack_layers

RENAMED = (
    (r"^model\.", ""),
    (r"^lm_head\.weight", "head.kernel"),
    (r"embed_tokens\.weight", "embed.embedding"),
    (r"self_attn\.(\w)_proj\.weight", r"attention.\1.kernel"),
    (r"mlp\.(\w+)_proj\.weight", r"mlp.\1.kernel"),
    (r"input_layernorm\.weight", "attention_norm.scale"),
    (r"post_attention_layernorm\.weight", "mlp_norm.scale"),
    (r"norm\.weight", "norm.scale"),
)


def split(config, seed=0):
    """The model as a function of its parameters, and parameters."""
    graphdef, params, rest = nnx.split(Llama(config, rngs=nnx.Rngs(seed)), nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    return jax.jit(lambda params, tokens: nnx.merge(graphdef, params, rest)(tokens)), params


def random_tokens(rows=2, length=16):
    return jax.random.randint(jax.random.key(1), (rows, length), 0, SMALL.vocab_size)


def lively(params):
    """Weights large enough that attention and gates are far from uniform."""
    return jax.tree.map_with_path(
        lambda path, p: p if "scale" in jax.tree_util.keystr(path) else p * 10, params
    )


def from_hugging_face(weights):
    """A state of transformers' LLaMA, (out, in) weights, as our nested dict."""
    params = {}
    for name, weight in weights.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        *parents, last = (int(k) if k.isdigit() else k for k in name.split("."))
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(weight.T if last == "kernel" else weight)
    return params


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, stacked):
    tokens, expected = arrays(case)["tokens"], arrays(case)["logits"]
    params = from_hugging_face(weights(case))
    apply, initial = split(dataclasses.replace(CASES[case], stacked=stacked))
    params = stack_layers(params) if stacked else params
    same_shapes = jax.tree.map(lambda a, b: a.shape == b.shape, params, nnx.to_pure_dict(initial))
    assert jax.tree.all(same_shapes)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(apply(params, tokens), expected, rtol=0, atol=1e-4)


def test_parameter_names_and_shapes():
    _, params = split(SMALL)
    shapes = {".".join(map(str, k)): v.shape for k, v in nnx.to_flat_state(nnx.as_pure(params))}
    layer = {
        "attention.q.kernel": (32, 32),
        "attention.k.kernel": (32, 16),
        "attention.v.kernel": (32, 16),
        "attention.o.kernel": (32, 32),
        "mlp.gate.kernel": (32, 48),
        "mlp.up.kernel": (32, 48),
        "mlp.down.kernel": (48, 32),
        "attention_norm.scale": (32,),
        "mlp_norm.scale": (32,),
    }
    expected = {"embed.embedding": (64, 32), "norm.scale": (32,), "head.kernel": (32, 64)}
    expected |= {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert shapes == expected


@pytest.mark.parametrize("stacked", [False, True])
def test_initialisation(stacked):
    _, params = split(dataclasses.replace(SMALL, hidden=64, intermediate=128, stacked=stacked))
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(params))
    for path, leaf in leaves:
        if "scale" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(leaf, 1)
        else:
            assert abs(float(jnp.std(leaf)) - 0.02) < 0.002
            assert abs(float(jnp.mean(leaf))) < 0.002
    kernels = [leaf for path, leaf in leaves if "gate" in jax.tree_util.keystr(path)]
    first, second = kernels[0] if stacked else kernels
    assert not np.array_equal(first, second)


def logits_and_gradients(config, params, tokens):
    """Compiled together, because compilation is most of the time of these tests."""
    apply, _ = split(config)
    weights = jnp.sin(jnp.arange(config.vocab_size))

    def loss(params):
        logits = apply(params, tokens)
        return jnp.mean(logits**2 * weights), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    return logits, grads


def test_stacking_and_remat_change_neither_logits_nor_gradients():
    tokens = random_tokens()
    params = lively(nnx.to_pure_dict(split(SMALL)[1]))
    logits, grads = logits_and_gradients(SMALL, params, tokens)
    assert all(jnp.max(jnp.abs(g)) > 1e-4 for g in jax.tree.leaves(grads))
    for stacked, remat in ((True, False), (False, True), (True, True)):
        config = dataclasses.replace(SMALL, stacked=stacked, remat=remat)
        given = stack_layers(params) if stacked else params
        logits_, grads_ = logits_and_gradients(config, given, tokens)
        grads_ = unstack_layers(grads_) if stacked else grads_
        np.testing.assert_allclose(logits_, logits, rtol=0, atol=1e-5)
        for a, b in zip(jax.tree.leaves(grads_), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("stacked", [False, True])
def test_remat_recomputes_the_layers(stacked):
    def recomputations(remat):
        apply, params = split(dataclasses.replace(SMALL, stacked=stacked, remat=remat))
        params = nnx.to_pure_dict(params)
        grad = jax.grad(lambda p: apply(p, random_tokens()).sum())
        return str(jax.make_jaxpr(grad)(params)).count("prevent_cse=")

    assert recomputations(remat=False) == 0
    assert recomputations(remat=True) > 0


def test_unstack_inverts_stack():
    params = nnx.to_pure_dict(split(SMALL)[1])
    back = unstack_layers(stack_layers(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(("param_dtype", "tied"), [("float32", False), ("bfloat16", True)])
def test_bfloat16_is_close_to_float32(param_dtype, tied):
    exact = dataclasses.replace(SMALL, tied_embeddings=tied)
    config = dataclasses.replace(exact, dtype="bfloat16", param_dtype=param_dtype)
    params = lively(nnx.to_pure_dict(split(config)[1]))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    logits, grads = logits_and_gradients(config, params, random_tokens())
    assert logits.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(param_dtype)}

    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    expected, expected_grads = logits_and_gradients(exact, wide, random_tokens())
    assert 1e-5 < relative_error(logits, expected) < 0.02
    for grad, expected_grad in zip(
        jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        assert relative_error(grad, expected_grad) < 0.06


def relative_error(x, expected):
    return float(jnp.linalg.norm(x - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_later_token_does_not_alter_earlier_logits(stacked):
    apply, params = split(dataclasses.replace(SMALL, stacked=stacked))
    params = lively(nnx.to_pure_dict(params))
    tokens = random_tokens()
    changed = tokens.at[:, 9].set((tokens[:, 9] + 1) % SMALL.vocab_size)
    before, after = apply(params, tokens), apply(params, changed)
    np.testing.assert_array_equal(after[:, :9], before[:, :9])
    assert jnp.all(jnp.max(jnp.abs(after - before)[:, 9:], axis=-1) > 1e-3)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("60m", 58.1e6),
        ("130m", 134.1e6),
        ("350m", 368.0e6),
        ("1b", 1339.1e6),
        ("7b", 6738.4e6),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_parameter_count_of_published_models(preset, count):
    published = parameter_count(MODEL_PRESETS[preset])
    assert published == count if isinstance(count, int) else abs(published - count) < 0.05e6


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("preset", MODEL_PRESETS)
def test_presets_are_made_abstractly(preset, stacked):
    config = dataclasses.replace(MODEL_PRESETS[preset], stacked=stacked)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == parameter_count(config)
    tokens = jax.ShapeDtypeStruct((2, config.max_length), jnp.int32)
    logits = nnx.eval_shape(lambda model, tokens: model(tokens), model, tokens)
    assert (logits.shape, logits.dtype) == ((*tokens.shape, config.vocab_size), jnp.float32)


def test_a_row_that_is_too_long_is_refused():
    apply, params = split(SMALL)
    with pytest.raises(ValueError, match=r"65 tokens.*max_length=64"):
        apply(params, jnp.zeros((1, 65), jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"vocab_size": -5}, "vocab_size must be at least 1, got -5"),
        ({"rope_theta": 0.0}, "rope_theta must be positive, got 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps must be positive, got nan"),
        ({"dtype": "float16"}, "dtype must be one of .*'float32', 'bfloat16'.*got 'float16'"),
        ({"param_dtype": "int8"}, "param_dtype must be one of"),
        ({"hidden": 30}, "hidden=30 is not a multiple of heads=4"),
        ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"hidden": 12}, "must be even, got 12 / 4 = 3"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
