"""Keys of matrices, and normal numbers that do not depend on ``jax_threefry_partitionable``.

JAX reads the option when a program is lowered, outside the configuration that kernels set.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from natgalore_jax._src.params.context import matrices_of
from natgalore_jax._src.params.plan import LeafPlan


def matrix_keys(plan: LeafPlan, key: jax.Array, first: jax.typing.ArrayLike = 0) -> jax.Array:
    """A key for each matrix of a parameter, whose numbers start at ``first``: (layers,)."""
    numbers = first + jnp.arange(plan.layers, dtype=jnp.int32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def numbers_of(plans: Sequence[LeafPlan | None]) -> list[Any]:
    """Number of each parameter, and of its first matrix in this view: int32."""
    return [
        plan and (jnp.int32(i), jnp.asarray(matrices_of(plan)[1], jnp.int32))
        for i, plan in enumerate(plans)
    ]


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``jax.random.normal`` with ``jax_threefry_partitionable``, JAX's default.

    Args:
      key: of the implementation "threefry2x32".
      shape: of the result, with fewer than 2³² entries.

    Returns:
      float32.
    """
    size = math.prod(shape)
    low = jax.lax.iota(jnp.uint32, size)
    words = threefry_2x32(jax.random.key_data(key), jnp.concatenate([jnp.zeros_like(low), low]))
    bits = words[:size] ^ words[size:]
    # 23 bits of mantissa below the exponent of one: a float in [1, 2).
    unit = jax.lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32) - 1
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(unit * (1 - least) + least, least)
    return (np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)).reshape(shape)
