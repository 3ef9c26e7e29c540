"""Stacks resharded by layer over eight simulated devices, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgalore_jax._src.params.placement import spec_of
from natgalore_jax._src.refresh.all_to_all import shard_by_layer, unshard_by_layer

MESH_SHAPE, MESH_AXES = (2, 2, 2), ("a", "b", "c")
LAYERS, ROWS, COLUMNS = 8, 8, 12
LAYOUTS = [
    # The mesh axes of layers, rows and columns.
    ((), ("a", "b", "c"), ()),
    ((), ("c", "a"), ("b",)),
    (("b",), (), ("c", "a")),
    (("a", "b", "c"), (), ()),
    (("c",), ("a",), ()),  # replicated over b
    ((), (), ()),  # replicated
]


@pytest.mark.parametrize("of", LAYOUTS)
def test_resharding_by_layer_and_back(of):
    mesh = jax.make_mesh(MESH_SHAPE, MESH_AXES)
    of_layers = of[0]
    others = [n for n in ("b", "c", "a") if n not in of_layers]
    names = (*of_layers, *others)
    x = jnp.arange(LAYERS * ROWS * COLUMNS).reshape(LAYERS, ROWS, COLUMNS)
    spec = spec_of(of)

    def there_and_back(part):
        own = shard_by_layer(part, 0, of, names)
        return own, unshard_by_layer(own, 0, of, names)

    with jax.set_mesh(mesh):
        sharded = jax.sharding.reshard(x, spec)
        by_layer, back = jax.jit(
            jax.shard_map(there_and_back, in_specs=spec, out_specs=(jax.P(names), spec))
        )(sharded)
    np.testing.assert_array_equal(back, x)
    assert back.sharding.is_equivalent_to(sharded.sharding, 3)
    np.testing.assert_array_equal(by_layer, x)
    sizes = {shard.data.shape for shard in by_layer.addressable_shards}
    assert sizes == {(LAYERS // 8, ROWS, COLUMNS)}
