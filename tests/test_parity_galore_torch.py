"""The library against galore-torch 1.0, whose steps are recorded in fixtures/galore_torch.npz.

torch keeps a weight as (out, in), a Flax kernel is its transpose: `std`, which projects the columns
of a square weight, projects the rows of a square kernel, as `side="short"` does. `reverse_std`
projects the other side of it, where `side="long"` gives a tie to the rows as well: for the square
kernel it is `side="right"`.
"""

import numpy as np
import pytest
from oracles.galore import Adam, galore
from replay import flax, recorded, recorded_tree, replay

import natgalore_jax as ng

ARRAYS, SETTINGS = recorded()
LR, (B1, B2) = SETTINGS["lr"], SETTINGS["betas"]
SIDES = [
    ("std", "short", ("up", "down", "mix", "embed", "norm")),
    ("std_decay", "short", ("up", "down", "mix", "embed", "norm")),
    ("reverse_std", "long", ("up", "down", "embed", "norm")),
    ("reverse_std", "right", ("mix",)),
    ("full", "both", ("up", "down", "mix", "embed", "norm")),
]
TINY_EPS_SIDES = [
    ("std_tiny_eps", "short", ("up", "down", "mix", "embed", "norm")),
    ("reverse_std_tiny_eps", "long", ("up", "down", "embed", "norm")),
    ("reverse_std_tiny_eps", "right", ("mix",)),
]


PROJECTION = dict(
    rank=SETTINGS["rank"],
    update_interval=SETTINGS["interval"],
    where={name: name in SETTINGS["matrices"] for name in recorded_tree()[0]},
)


def _published(case, side):
    recorded_case = SETTINGS["cases"][case]
    return ng.published_galore_adamw(
        LR,
        scale=SETTINGS["scale"],
        b1=B1,
        b2=B2,
        eps=recorded_case["eps"],
        weight_decay=recorded_case["weight_decay"],
        side=side,
        **PROJECTION,
    )


def _with_optax_adam(case, side):
    return ng.galore_adamw(
        LR,
        scale=SETTINGS["scale"],
        b1=B1,
        b2=B2,
        eps=SETTINGS["cases"][case]["eps"],
        weight_decay=0.0,
        side=side,
        method="svd",
        stagger=False,
        **PROJECTION,
    )


def _assert_as_recorded(trajectory, case, names):
    for name in names:
        expected = ARRAYS[f"{case}/{name}"]
        if name in SETTINGS["matrices"]:
            expected = flax(expected)
        actual = trajectory[name][ARRAYS["steps"] - 1]
        # In float32, 1 − 0.999ᵗ is good to 1e-5 at first, and every step moves a weight by 1e-2.
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case, side, names", SIDES)
def test_every_recorded_step(case, side, names):
    _assert_as_recorded(replay(_published(case, side), *recorded_tree()), case, names)


@pytest.mark.parametrize("case, side, names", TINY_EPS_SIDES)
def test_optax_adam_where_its_eps_cannot_matter(case, side, names):
    _assert_as_recorded(replay(_with_optax_adam(case, side), *recorded_tree()), case, names)


@pytest.mark.parametrize("name", SETTINGS["matrices"])
def test_galore_torch_untouched_is_the_oracle_with_its_signs(name):
    """Closes the gap that the fixture's signs leave: see make_galore_torch.py."""
    refresh = iter(range(3))

    def torch_bases(G, rank, side):
        i = next(refresh)
        U, V = (ARRAYS[f"torch_signs/bases/{name}/{i}/{x}"] for x in "UV")
        m, n = G.shape
        return (U, np.eye(n)) if m < n else (np.eye(m), V)

    trajectory = galore(
        ARRAYS[f"init/{name}"],
        ARRAYS[f"grads/{name}"],
        rank=SETTINGS["rank"],
        interval=SETTINGS["interval"],
        side="recorded",
        lr=LR,
        scale=SETTINGS["scale"],
        adam=Adam(B1, B2, eps=0.0, eps_hf=SETTINGS["cases"]["torch_signs"]["eps"]),
        bases=torch_bases,
    )
    expected = ARRAYS[f"torch_signs/{name}"]
    np.testing.assert_allclose(trajectory[ARRAYS["steps"] - 1], expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(expected[-1], ARRAYS[f"std/{name}"][-1], atol=1e-3)
