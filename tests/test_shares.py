"""Stacks dealt out by their layers over eight simulated devices, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgalore_jax._src.params.placement import spec_of
from natgalore_jax._src.refresh.all_to_all import from_shares, to_shares

MESH_SHAPE, MESH_AXES = (2, 2, 2), ("a", "b", "c")
LAYERS, ROWS, COLUMNS = 8, 8, 12
LAYOUTS = [
    # The mesh axes of layers, rows and columns.
    ((), ("a", "b", "c"), ()),
    ((), ("c", "a"), ("b",)),
    (("b",), (), ("c", "a")),
    (("a", "b", "c"), (), ()),
    (("c",), ("a",), ()),  # whole over b
    ((), (), ()),
]


@pytest.mark.parametrize("of", LAYOUTS)
def test_every_device_has_its_layers_whole_and_gives_them_back(of):
    mesh = jax.make_mesh(MESH_SHAPE, MESH_AXES)
    of_layers = of[0]
    others = [n for n in ("b", "c", "a") if n not in of_layers]
    names = (*of_layers, *others)
    x = jnp.arange(LAYERS * ROWS * COLUMNS).reshape(LAYERS, ROWS, COLUMNS)
    spec = spec_of(of)

    def there_and_back(part):
        own = to_shares(part, 0, of, names)
        return own, from_shares(own, 0, of, names)

    with jax.set_mesh(mesh):
        divided = jax.sharding.reshard(x, spec)
        shares, back = jax.jit(
            jax.shard_map(there_and_back, in_specs=spec, out_specs=(jax.P(names), spec))
        )(divided)
    np.testing.assert_array_equal(back, x)
    assert back.sharding.is_equivalent_to(divided.sharding, 3)
    np.testing.assert_array_equal(shares, x)
    sizes = {shard.data.shape for shard in shares.addressable_shards}
    assert sizes == {(LAYERS // 8, ROWS, COLUMNS)}
