"""A stacked parameter (L, m, n) is L separate matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from replay import replay

import natgalore_jax as ng

L, M, N, INTERVAL, STEPS = 3, 6, 9, 4, 9
GRADS = np.random.default_rng(0).normal(size=(STEPS, L, M, N)).astype(np.float32)
STACKED = {"layers": GRADS}
SEPARATE = {f"layer_{i}": GRADS[:, i] for i in range(L)}


def optimizer(axes=None, update_interval=INTERVAL, **settings):
    return composed_adamw(
        "stored",
        0.1,
        rank=2,
        update_interval=update_interval,
        history=3,
        damping=0.3,
        residual="fira",
        eps=1e-3,
        where=dict.fromkeys(settings.pop("names"), True),
        axes=axes,
        **settings,
    )


def updates_and_bases(tx, grads):
    """Updates and bases of every step, (steps, ...)."""

    def step(state, g):
        updates, state = tx.update(g, state, g)
        return state, (updates, state[0].basis)

    first = jax.tree.map(lambda g: g[0], grads)
    return jax.jit(lambda g: jax.lax.scan(step, tx.init(first), g)[1])(grads)


@pytest.mark.parametrize(
    ("side", "method", "transition"),
    [
        ("short", "power", "rotate"),
        ("long", "svd", "keep"),
        ("both", "power", "reset"),
        ("right", "online", "rotate"),
        ("left", "eigh", "rotate"),
    ],
)
def test_stacked_equals_separate(side, method, transition):
    settings = {"side": side, "method": method, "transition": transition}
    # "online" moves all at every step.
    settings |= {"update_interval": 1} if method == "online" else {"stagger": False}
    stacked, _ = updates_and_bases(optimizer(names=STACKED, **settings), STACKED)
    separate, _ = updates_and_bases(optimizer(names=SEPARATE, **settings), SEPARATE)
    for i in range(L):
        np.testing.assert_allclose(
            stacked["layers"][:, i], separate[f"layer_{i}"], rtol=1e-3, atol=1e-4
        )


def test_batch_axes_may_stand_anywhere():
    """(m, L, n) with rows 0 and columns 2 is the same stack."""
    settings = {"stagger": False}
    stacked, _ = updates_and_bases(optimizer(names=STACKED, **settings), STACKED)
    moved = {"layers": np.swapaxes(GRADS, 1, 2)}
    axes = ng.MatrixAxes(rows=0, cols=2)
    other, _ = updates_and_bases(optimizer(names=moved, axes=axes, **settings), moved)
    np.testing.assert_allclose(
        np.swapaxes(other["layers"], 1, 2), stacked["layers"], rtol=1e-3, atol=1e-4
    )


def test_staggered_layers_are_refreshed_once_per_interval_each_in_its_own_step():
    tx = ng.chain(ng.low_rank_project(rank=2, update_interval=INTERVAL), optax.identity())
    _, bases = updates_and_bases(tx, STACKED)
    rows = np.asarray(bases[0]["layers"])
    changed = (rows[1:] != rows[:-1]).any(axis=(2, 3))  # (steps − 1, L)
    for start in range(STEPS - INTERVAL):
        np.testing.assert_array_equal(changed[start : start + INTERVAL].sum(axis=0), 1)
    assert changed.sum(axis=1).max() == 1


def test_layers_do_not_mix():
    """A layer with no gradient stays where it is, whatever the others do."""
    grads = {"layers": GRADS * np.array([1, 0, 1], np.float32)[:, None, None]}
    updates, _ = updates_and_bases(optimizer(names=grads, weight_decay=0.0, stagger=False), grads)
    np.testing.assert_array_equal(np.asarray(updates["layers"])[:, 1], 0)
    alone, _ = updates_and_bases(optimizer(names=STACKED, weight_decay=0.0, stagger=False), STACKED)
    np.testing.assert_allclose(updates["layers"][:, 0], alone["layers"][:, 0], rtol=1e-3, atol=1e-5)
    assert jnp.isfinite(updates["layers"]).all()


CONTRIB = {
    "alice": (ng.contrib.alice_adamw, {"b3": 0.999}, 1e-3, 1e-4),
    "alice without tracking": (ng.contrib.alice_adamw, {"b3": 0.0}, 1e-3, 1e-4),
    "ldadam": (ng.contrib.ldadamw, {"rank": 3, "error_feedback": True, "eps": 1e-3}, 1e-3, 1e-4),
    "racs": (ng.contrib.racs_adamw, {}, 1e-4, 1e-6),
    "scale": (ng.contrib.scale_sgd, {"head": True}, 1e-5, 1e-6),
}
# All eigenvectors of Alice stay: draws are of a matrix's own.
ALICE = {"rank": 2, "leading": 2, "update_interval": INTERVAL}


@pytest.mark.parametrize("name", CONTRIB)
def test_stacked_equals_separate_with_other_methods(name):
    """A stack with its batch axis in the middle and two axes for its columns: (m, L, a, b)."""
    factory, settings, rtol, atol = CONTRIB[name]
    settings |= ALICE if "alice" in name else {}
    make = functools.partial(factory, 0.1, where=True, **settings)
    grads = np.random.default_rng(0).standard_normal((STEPS, 4, 2, 3, 5)).astype(np.float32)
    # They grow and shrink by so much that limits act at some steps and not at others.
    grads *= np.array([1, 1.5, 0.3, 2, 1, 4, 0.5, 9, 1], np.float32).reshape(STEPS, 1, 1, 1, 1)
    separate = {f"{i}": grads[:, :, i].reshape(STEPS, 4, 15) for i in range(2)}
    zeros = jax.tree.map(lambda g: np.zeros_like(g[0]), separate)
    axes = ng.MatrixAxes(rows=0, cols=(2, 3))
    stacked = replay(make(axes=axes), {"w": np.zeros_like(grads[0])}, {"w": grads})["w"]
    for i, expected in replay(make(), zeros, separate).items():
        actual = stacked[:, :, int(i)].reshape(STEPS, 4, 15)
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)
