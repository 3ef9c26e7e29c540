"""The default rule for what is projected, on the parameter names of published models."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgalore_jax as ng

FILE = pathlib.Path(__file__).parent / "fixtures" / "parameter_names.txt"


def table():
    for line in FILE.read_text().splitlines():
        if line and not line.startswith("#"):
            name, shape, projected = line.split()
            yield name, tuple(map(int, shape.split(","))), {"yes": True, "no": False}[projected]


TABLE = list(table())


def nested(keys, leaf):
    for key in reversed(keys):
        leaf = {key: leaf}
    return leaf


def forms(name):
    """The name as its model has it, split into one key a part, and as a tuple for one key."""
    keys = name.split("|")
    parts = [part for key in keys for part in re.split(r"[./]", key)]
    return keys, parts, [tuple(parts)], [tuple(parts[:-1]), parts[-1]]


@pytest.mark.parametrize("name, shape, projected", TABLE, ids=[f"{n}-{s}" for n, s, _ in TABLE])
def test_names_of_published_models(name, shape, projected):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    is_matrix = len(shape) > 1
    for keys in forms(name):
        tree = nested(keys, leaf)
        found = jax.tree.map_with_path(ng.hidden_matrices, tree)
        assert jax.tree.leaves(found) == [projected], keys
    assert ng.hidden_matrices(name.replace("|", "/"), leaf) is projected
    assert is_matrix or not projected


def test_attributes_and_indices_are_parts_of_names():
    keys = jax.tree_util
    leaf = jnp.zeros((64, 32))

    def path(*names):  # layers[0].<names>, as Equinox and NNX have it
        return (
            keys.GetAttrKey("layers"),
            keys.SequenceKey(0),
            *map(keys.GetAttrKey, names),
            keys.FlattenedIndexKey(0),
        )

    assert ng.hidden_matrices(path("attn", "q_proj", "weight"), leaf)
    assert not ng.hidden_matrices(path("wte", "weight"), leaf)
    assert not ng.hidden_matrices(path("mlp", "bias"), leaf)


def test_joined_names_have_no_state_in_a_subspace():
    params = {
        "model.layers.0.mlp.up_proj.weight": jnp.zeros((96, 64)),
        "model.embed_tokens.weight": jnp.zeros((96, 64)),
        "lm_head.weight": jnp.zeros((96, 64)),
        ("model", "wte", "weight"): jnp.zeros((96, 64)),
    }
    params = {str(i): {k: v} for i, (k, v) in enumerate(params.items())}  # keys of one type each
    bases = ng.natural_galore_adamw(1e-2, rank=4).init(params)[0].basis
    assert [leaf.shape for leaf in jax.tree.leaves(bases)] == [(64, 4)]


def test_names_that_read_alike_are_different_parameters():
    params = {"a": {"b": jnp.ones((6, 8))}, "a/b": jnp.ones(8)}
    tx = ng.chain(ng.low_rank_project(rank=2), ng.woodbury_natural_gradient(history=2))
    updates, state = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(updates["a/b"], params["a/b"])
    assert isinstance(state[1].history.gram["a/b"], optax.MaskedNode)

    params = {"a": {"b": jnp.ones((6, 8))}, "a/b": jnp.ones((3, 6, 8))}
    state = tx.init(params)
    assert state[1].history.columns["a"]["b"].shape == (2, 2, 8)
    assert state[1].history.columns["a/b"].shape == (3, 2, 2, 8)
    rows = ng.memory_report(tx, params).parameters
    assert [row.layers for row in rows] == [1, 3]
