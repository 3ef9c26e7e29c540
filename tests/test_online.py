"""GaLore and Natural GaLore with bases that follow the gradient by a small step at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composed import composed_adamw
from oracles.galore import Adam, galore
from oracles.ldadam import ordered_polar_factor
from oracles.published_natural_galore import published_natural_galore
from replay import replay

import natgalore_jax as ng

STEPS, RANK, LR = 6, 3, 0.05
RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 9)).astype(np.float32)
SIGNAL = 3 * RNG.standard_normal((6, RANK)) @ RNG.standard_normal((RANK, 9))
GRADS = (SIGNAL + RNG.standard_normal((STEPS, 6, 9))).astype(np.float32)
SETTINGS = {"rank": RANK, "method": "online", "transition": "keep", "weight_decay": 0.0}


def oja(P, G):
    """``polar((P + 0.1 G Gᵀ P r / tr(Pᵀ G Gᵀ P)) D)`` with weights D from 1 to 1e-4."""
    Z, r = G.T @ P, P.shape[1]
    return ordered_polar_factor(P + 0.1 * r * G @ Z / np.sum(Z * Z))


def following(first):
    """Left bases for the oracles: the first is given, later ones follow Oja's rule."""
    steps = []

    def bases(G, rank, side):
        steps.append(oja(steps[-1], G) if steps else np.asarray(first, np.float64))
        return steps[-1], np.eye(G.shape[1])

    return bases


def first_basis(tx, grads=GRADS):
    _, state = tx.update({"w": grads[0]}, tx.init({"w": W}), {"w": W})
    return state[0].basis[0]["w"]


def test_galore():
    tx = composed_adamw("none", LR, **SETTINGS, side="left", eps=1e-3, scale=0.25)
    expected = galore(
        W,
        GRADS,
        rank=RANK,
        interval=1,
        side="left",
        lr=LR,
        scale=0.25,
        adam=Adam(eps=1e-3),
        bases=following(first_basis(tx)),
    )
    trajectory = replay(tx, {"w": W}, {"w": GRADS})["w"]
    np.testing.assert_allclose(trajectory, expected, rtol=1e-4, atol=1e-5)


def test_natural_galore():
    """Gradients so small that natural gradients are large, and it is no matter where ε stands."""
    # In this order no first natural gradient is near zero, where Adam's first step jumps.
    grads = 0.01 * GRADS[::-1]
    tx = composed_adamw(
        "stored",
        LR,
        **SETTINGS,
        side="left",
        history=3,
        damping=0.05,
        eps=1e-8,
        scale=0.25,
        residual="none",
    )
    expected = published_natural_galore(
        W,
        grads,
        rank=RANK,
        interval=1,
        lr=LR,
        history=3,
        damping=0.05,
        scale=0.25,
        bases=following(first_basis(tx, grads)),
    )
    trajectory = replay(tx, {"w": W}, {"w": grads})["w"]
    np.testing.assert_allclose(trajectory, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fisher", ["none", "compact"])
def test_the_basis_moves_at_every_step_and_stays_orthonormal(fisher):
    tx = composed_adamw(fisher, LR, rank=RANK, method="online")
    state, update, last = tx.init({"w": W}), jax.jit(tx.update), None
    for G in GRADS:
        _, state = update({"w": G}, state, {"w": W})
        P = np.asarray(state[0].basis[0]["w"])
        np.testing.assert_allclose(P.T @ P, np.eye(RANK), atol=1e-5)
        if last is not None:
            moved = np.linalg.norm(P @ P.T - last @ last.T)
            assert 1e-4 < moved < 1.0
        last = P


LONG = 3000
BASIS = np.linalg.qr(np.random.default_rng(3).standard_normal((64, 64)))[0][:, :12]


@functools.cache
def second_moments(method, basis_dtype):
    """Row means of ν after 3,000 refreshes with gradients of one distribution, in decades."""
    m, n, rank = 64, 16, 6
    tx = ng.chain(
        ng.low_rank_project(
            rank=rank, method=method, update_interval=1, side="left", basis_dtype=basis_dtype
        ),
        optax.scale_by_adam(),
        ng.project_back(),
    )
    A = jnp.asarray(BASIS * np.logspace(0, -1, 12), jnp.float32)
    W = {"w": jnp.zeros((m, n))}

    def step(state, key):
        signal, noise = jax.random.split(key)
        g = A @ jax.random.normal(signal, (12, n)) + 0.02 * jax.random.normal(noise, (m, n))
        return tx.update({"w": g}, state, W)[1], None

    keys = jax.random.split(jax.random.key(0), LONG)
    state, _ = jax.jit(lambda s, keys: jax.lax.scan(step, s, keys))(tx.init(W), keys)
    return np.sort(np.mean(np.asarray(state[1].nu["w"]), axis=1))


@pytest.mark.parametrize(
    "method,basis_dtype,of_sum,of_rows",
    [
        ("online", "int8", 0.01, 0.05),
        ("online", "bfloat16", 0.01, 0.05),
        ("power", "int8", 0.01, 0.03),
        ("power", "int4", 0.03, 0.10),
    ],
)
def test_rounded_bases_do_not_add_up_in_second_moments(method, basis_dtype, of_sum, of_rows):
    """With C of the rounded bases ν grows by what rounding adds to PᵀP, at every step."""
    exact, rounded = (second_moments(method, dtype) for dtype in (None, basis_dtype))
    assert abs(rounded.sum() / exact.sum() - 1) < of_sum
    assert np.abs(rounded / exact - 1).max() < of_rows, rounded / exact
