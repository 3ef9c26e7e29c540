"""SCALE against its algorithm in float64 NumPy, and which parameters it takes for what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles.scale import scale
from replay import replay

import natgalore_jax as ng

STEPS = 6
RNG = np.random.default_rng(0)
SHAPES = {"embed": (9, 4), "mlp": (4, 6), "lm_head": (4, 9), "norm": (4,)}
PARAMS = {k: RNG.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
GRADS = {k: RNG.standard_normal((STEPS, *s)).astype(np.float32) for k, s in SHAPES.items()}


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_every_step(norm):
    tx = ng.contrib.scale_sgd(0.1, norm=norm, momentum=0.8, weight_decay=0.1, vector_ratio=3.0)
    trajectory = replay(tx, PARAMS, GRADS)
    settings = {"lr": 0.1, "norm": norm, "beta": 0.8, "weight_decay": 0.1}
    for name in ("embed", "mlp", "lm_head"):
        expected = scale(PARAMS[name], GRADS[name], is_last_layer=name == "lm_head", **settings)
        np.testing.assert_allclose(trajectory[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
        for wrong in ({"beta": 0.81}, {"lr": 0.101}, {"weight_decay": 0.11}):
            if "beta" in wrong and name != "lm_head":
                continue
            other = scale(
                PARAMS[name], GRADS[name], is_last_layer=name == "lm_head", **settings | wrong
            )
            assert not np.allclose(trajectory[name], other, rtol=1e-5, atol=1e-5), wrong
    adam = optax.chain(
        optax.scale_by_adam(), optax.scale(3.0), optax.add_decayed_weights(0.1), optax.scale(-0.1)
    )
    np.testing.assert_allclose(
        trajectory["norm"], replay(adam, PARAMS, GRADS)["norm"], rtol=1e-5, atol=1e-6
    )


def test_names_tell_heads_and_vectors():
    params = {
        "embed_tokens": {"embedding": jnp.ones((9, 4))},
        "layers": {"up": {"kernel": jnp.ones((2, 4, 6)), "bias": jnp.ones((2, 6))}},
        "attention": {"relative_attention_bias": jnp.ones((3, 4))},
        "layers_norm": {"scale": jnp.ones((2, 4))},
        "lm_head": {"kernel": jnp.ones((4, 9)), "bias": jnp.ones(9)},
        "router": {"kernel": jnp.ones((4, 3))},
    }
    state = ng.contrib.scale_by_column_norms().init(params)

    def stored(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}

    assert stored(state.momentum) == {"lm_head/kernel"}
    assert stored(state.adam.mu) == {"layers/up/bias", "layers_norm/scale", "lm_head/bias"}


def test_tied_embeddings_have_momentum_where_head_says_so():
    params = {"embed": jnp.ones((9, 4)), "mlp": jnp.ones((4, 6))}
    assert jax.tree.leaves(ng.contrib.scale_by_column_norms().init(params).momentum) == []
    tx = ng.contrib.scale_by_column_norms(
        head=lambda path, leaf: "embed" in path,
        axes={"embed": ng.MatrixAxes(rows=1, cols=0), "mlp": None},
    )
    updates, state = tx.update(
        jax.tree.map(lambda x: x * jnp.arange(x.shape[1]), params), tx.init(params)
    )
    assert state.momentum["embed"].shape == (9, 4)
    assert state.momentum["mlp"] == optax.MaskedNode()
    np.testing.assert_allclose(np.mean(np.square(updates["embed"]), 1), 1, rtol=1e-5)


def test_a_head_that_where_leaves_out_is_an_error():
    params = {"mlp": jnp.ones((4, 6)), "lm_head": {"kernel": jnp.ones((4, 9)), "bias": jnp.ones(9)}}

    def head(path, leaf):
        return "lm_head" in path

    tx = ng.contrib.scale_sgd(0.1, head=head, where=ng.hidden_matrices)
    with pytest.raises(ValueError, match=r"lm_head/kernel: head selects .* where leaves it out"):
        tx.init(params)
    # Not an error: biases of a head, and heads by their names.
    for settings in ({"head": head}, {"where": ng.hidden_matrices}, {"head": head, "where": True}):
        of = (
            params
            if settings.get("where") is not True
            else {"lm_head": params["lm_head"]["kernel"]}
        )
        ng.contrib.scale_by_column_norms(**settings).init(of)


def test_columns_of_zeros_stay_zero_and_sizes_do_not_matter():
    gradient = jnp.asarray(GRADS["mlp"][0]).at[:, 2].set(0.0)
    for factor, eps in ((1e-5, 1e-8), (1.0, 0.0), (1e15, 1e-8)):
        tx = ng.contrib.scale_by_column_norms(head=True, where=True, eps=eps)
        updates, _ = tx.update({"w": factor * gradient}, tx.init({"w": gradient}))
        lengths = np.sqrt(np.mean(np.square(updates["w"]), 0))
        np.testing.assert_allclose(lengths, np.arange(6) != 2, rtol=1e-5)


def test_the_state_is_the_momentum_of_the_head_and_the_report_shows_it():
    params = {
        "mlp": jax.ShapeDtypeStruct((3, 64, 256), jnp.bfloat16),
        "lm_head": jax.ShapeDtypeStruct((64, 512), jnp.bfloat16),
        "norm": jax.ShapeDtypeStruct((64,), jnp.bfloat16),
    }
    report = ng.memory_report(ng.contrib.scale_sgd(1e-3), params)
    state_bytes = {p.path: p.inner_bytes for p in report.parameters}
    assert state_bytes == {"mlp": 0, "lm_head": 2 * 64 * 512, "norm": 2 * 2 * 64}
    assert report.total_state_bytes == sum(state_bytes.values()) + report.shared_bytes
    assert report.shared_bytes == 4  # Adam's count


@pytest.mark.parametrize("name", ["lm_haed", "b"])
def test_a_head_that_is_no_matrix_is_an_error_of_init(name):
    params = {"mlp": jnp.ones((4, 6)), "lm_head": jnp.ones((4, 9)), "b": jnp.ones(4)}
    tx = ng.contrib.scale_sgd(0.1, head=lambda path, leaf: name in path)
    with pytest.raises(ValueError, match=r"head selects no matrix; received: b \(4,\), lm_head"):
        tx.init(params)
    tied = {"embed": jnp.ones((9, 4)), "mlp": jnp.ones((4, 6))}
    ng.contrib.scale_sgd(0.1).init(tied)  # By their names there may be none.
