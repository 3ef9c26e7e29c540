"""The bytes of other sides: what the report foretells against what they really cost."""

import jax.numpy as jnp
import optax
import pytest
from composed import composed_adamw

import natgalore_jax as ng

PARAMS = {
    "tall": jnp.zeros((10, 6)),
    "wide": jnp.zeros((6, 10)),
    "square": jnp.zeros((7, 7)),
    "stack": jnp.zeros((3, 6, 10)),
    "bias": jnp.zeros(10),
    "pairs": jnp.zeros((2, 10, 6, 10)),  # a norm per layer then looks like R
}


def natural(**kwargs):
    return composed_adamw("stored", 1e-2, **({"rank": 2, "history": 3} | kwargs))


@pytest.mark.parametrize("history", [2, 3])  # 2 is the rank: then a Gram matrix looks like R
@pytest.mark.parametrize(
    "wrap",
    [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 4), lambda tx: optax.chain(tx, optax.adam(1))],
    ids=["plain", "steps", "full-size moments"],
)
def test_alternatives_are_what_the_other_sides_cost(wrap, history):
    def report(side):
        tx = natural(side=side, history=history, history_dtype=jnp.bfloat16, residual="fira")
        return ng.memory_report(wrap(tx), PARAMS)

    found = report("left").alternative_state_bytes
    assert list(found) == ["short", "long", "both", "left", "right"]
    for side, total in found.items():
        assert total == report(side).total_state_bytes
        again = report(side).alternative_state_bytes
        assert again == found


def test_alternatives_with_axes():
    params = {"q": jnp.zeros((3, 12, 2, 4))}  # layers, embed, heads, head_dim

    def report(side):
        axes = ng.MatrixAxes(rows=1, cols=(2, 3))
        return ng.memory_report(natural(side=side, axes=axes), params)

    (q,) = report("short").parameters
    assert (q.side, q.layers) == ("right", 3)
    for side, total in q.alternatives.items():
        assert total == report(side).parameters[0].state_bytes


def test_unprojected_or_ambiguous_parameters_have_no_alternatives():
    two = ng.chain(
        *(ng.low_rank_project(rank=2, side="left"), optax.trace(0.9), ng.project_back()),
        *(ng.low_rank_project(rank=3, side="both"), optax.trace(0.9), ng.project_back()),
    )
    report = ng.memory_report(two, PARAMS)
    assert {p.path: p.side for p in report.parameters}["wide"] == "left"
    assert report.alternative_state_bytes == {}
    assert ng.memory_report(optax.adamw(1.0), PARAMS).alternative_state_bytes == {}
