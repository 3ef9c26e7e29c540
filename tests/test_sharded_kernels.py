"""Refreshes of matrices whose rows or columns are several axes, on a mesh with explicit axes."""

import jax
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import AxisType

import natgalore_jax as ng

pytestmark = pytest.mark.usefixtures("fast_compile")

RANK = 4


@pytest.mark.parametrize(
    ("shape", "axes", "spec", "side"),
    [
        ((24, 8, 12), ng.MatrixAxes(0, (1, 2)), jax.P(None, "x"), 24),
        ((24, 12, 8), ng.MatrixAxes(0, (1, 2)), jax.P(None, None, "x"), 24),
        ((3, 3, 16, 40), ng.MatrixAxes((0, 1, 2), 3), jax.P(None, None, "x"), 40),
        # The shorter side is sharded: R is summed, and its update is gathered.
        ((40, 16, 3, 3), ng.MatrixAxes(0, (1, 2, 3)), jax.P("x"), 16 * 3 * 3),
    ],
)
def test_a_kernel_exchanges_its_small_side_in_a_refresh(shape, axes, spec, side):
    """Of the gradient, devices exchange their shares where the axes of its rows are sharded."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    G = jax.random.normal(jax.random.key(0), shape)
    tx = ng.chain(ng.low_rank_project(RANK, 3, axes=axes), ng.project_back())
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(G, jax.NamedSharding(mesh, spec))}
        state = jax.jit(tx.init)(params)
        update = jax.jit(tx.update)
        exchanged = collectives(update.lower(params, state, params).compile())
        found, _ = update(params, state, params)
    for what, elements in exchanged:
        assert elements <= (G.size / 8 if what == "all-to-all" else side * RANK), what
    expected, _ = tx.update({"w": G}, tx.init({"w": G}), {"w": G})
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4, atol=1e-5)
