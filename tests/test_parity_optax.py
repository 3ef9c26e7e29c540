"""The library against optax.contrib.galore: the longer side of every matrix, exact SVD.

Optax takes the singular vectors of the gradient itself on both sides, with LAPACK's signs, and
leaves Adam's moments alone at a refresh: the numbers agree only if the library does so too.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from replay import recorded_tree, replay

import natgalore_jax as ng

RANK, INTERVAL, SCALE, LR = 4, 20, 0.25, 0.01


def _every_matrix(path, leaf):
    return leaf.ndim == 2


def _ours(side="long", transition="keep", rank=RANK, weight_decay=0.0, adam=None):
    return ng.chain(
        ng.low_rank_project(
            rank=rank,
            update_interval=INTERVAL,
            side=side,
            method="svd",
            transition=transition,
            stagger=False,
            where=_every_matrix,
        ),
        adam or optax.scale_by_adam(),
        ng.project_back(scale=SCALE),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(LR),
    )


def _optax(rank=RANK, weight_decay=0.0, adam=None):
    return optax.contrib.galore(
        LR,
        rank=rank,
        update_proj_gap=INTERVAL,
        scale=SCALE,
        base_optimizer=adam,
        weight_decay=weight_decay,
    )


@functools.cache
def _optax_trajectory(**options):
    return replay(_optax(**options), *recorded_tree())


def _assert_same(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), actual, expected
    )


def _largest_difference(actual, expected):
    return max(
        np.abs(actual[name] - expected[name]).max() for name in expected if expected[name].ndim == 3
    )


@pytest.mark.parametrize("rank, weight_decay", [(RANK, 0.0), (RANK, 0.1), (8, 0.0)])
def test_every_step_of_a_mixed_tree(rank, weight_decay):
    """Wide, tall and square kernels, an embedding and a vector; three bases."""
    params, grads = recorded_tree()
    expected = _optax_trajectory(rank=rank, weight_decay=weight_decay)
    _assert_same(replay(_ours(rank=rank, weight_decay=weight_decay), params, grads), expected)


def test_rank_above_a_side_is_clipped():
    rng = np.random.default_rng(0)
    shapes = {"thin": (3, 24), "narrow": (24, 3), "matrix": (24, 20)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    grads = {k: rng.normal(size=(60, *s)).astype(np.float32) for k, s in shapes.items()}
    _assert_same(replay(_ours(), params, grads), replay(_optax(), params, grads))


def test_another_inner_optimizer():
    params, grads = recorded_tree()
    expected = replay(_optax(adam=optax.scale_by_lion()), params, grads)
    _assert_same(replay(_ours(adam=optax.scale_by_lion()), params, grads), expected)


def test_galore_adamw_is_the_same_chain():
    params, grads = recorded_tree()
    tx = ng.galore_adamw(
        LR,
        rank=RANK,
        weight_decay=0.1,
        update_interval=INTERVAL,
        side="long",
        method="svd",
        stagger=False,
        scale=SCALE,
        where=_every_matrix,
    )
    expected = _optax_trajectory(rank=RANK, weight_decay=0.1)
    _assert_same(replay(tx, params, grads), expected)


def test_attention_kernels_with_the_dimension_numbers_of_optax():
    """Kernels of three and four axes, a matrix that is read as its transpose, and two without."""
    dims = optax.contrib.GaLoreDimensionNumbers
    axes = {
        "query": dims(0, (1, 2)),
        "out": dims((0, 1), 2),
        "grouped": dims((0, 3), (1, 2)),
        "transposed": dims(1, 0),
        "untouched": None,
        "bias": None,
    }
    shapes = {"query": (24, 3, 4), "out": (3, 4, 20), "grouped": (4, 3, 5, 6)}
    shapes |= {"transposed": (24, 20), "untouched": (12, 9), "bias": (12,)}
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    grads = {k: rng.normal(size=(60, *s)).astype(np.float32) for k, s in shapes.items()}
    theirs = optax.contrib.galore(
        LR, rank=RANK, update_proj_gap=INTERVAL, scale=SCALE, weight_dimension_numbers=axes
    )
    ours = ng.galore_adamw(
        LR,
        rank=RANK,
        weight_decay=0.0,
        update_interval=INTERVAL,
        side="long",
        method="svd",
        stagger=False,
        scale=SCALE,
        where=True,
        axes=axes,
    )
    _assert_same(replay(ours, params, grads), replay(theirs, params, grads))
    state, their_state = (
        jax.jit(tx.update)(jax.tree.map(lambda g: g[0], grads), tx.init(params), params)[1]
        for tx in (ours, theirs)
    )
    for name, P in optax.tree.get(their_state, "projector").items():
        bases = jax.tree.leaves([of_mode[name] for of_mode in optax.tree.get(state, "basis")])
        assert len(bases) == (axes[name] is not None)
        for Q in bases:
            Q = Q.reshape(P.shape)
            np.testing.assert_allclose(Q @ Q.T, P @ P.T, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("other", [{"side": "short"}, {"transition": "rotate"}, {"rank": 5}])
def test_the_comparison_notices_another_algorithm(other):
    params, grads = recorded_tree()
    expected = _optax_trajectory(rank=RANK, weight_decay=0.0)
    assert _largest_difference(replay(_ours(**other), params, grads), expected) > 1e-3
