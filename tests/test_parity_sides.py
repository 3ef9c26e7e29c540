"""Every side against GaLore in float64 NumPy."""

import jax
import numpy as np
import optax
import pytest
from oracles.galore import Adam, galore
from replay import recorded_tree, replay

import natgalore_jax as ng

KERNELS = ("up", "down", "mix")


@pytest.mark.parametrize("side", ["short", "long", "left", "right", "both"])
def test_every_step(side):
    params, grads = ({name: tree[name] for name in KERNELS} for tree in recorded_tree())
    # Two-sided, the first R is diagonal but for rounding errors, which a small ε would let Adam
    # scale up to ±1.
    eps = 1e-4
    tx = ng.chain(
        ng.low_rank_project(
            rank=4,
            update_interval=20,
            side=side,
            method="svd",
            transition="keep",
            stagger=False,
            where=jax.tree.map(lambda _: True, params),
        ),
        optax.scale_by_adam(eps=eps),
        ng.project_back(scale=0.25),
        optax.scale_by_learning_rate(0.01),
    )
    trajectory = replay(tx, params, grads)
    for name in KERNELS:
        expected = galore(
            params[name],
            grads[name],
            rank=4,
            interval=20,
            side=side,
            lr=0.01,
            scale=0.25,
            adam=Adam(eps=eps),
        )
        np.testing.assert_allclose(trajectory[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
