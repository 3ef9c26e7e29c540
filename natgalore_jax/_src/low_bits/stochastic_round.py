"""Stochastic rounding to bfloat16."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from natgalore_jax._src.kernels.dither import STRIDES, dither
from natgalore_jax._src.kernels.kernel import own_arithmetic
from natgalore_jax._src.params.checks import check_integer


@own_arithmetic
def stochastic_round(x: jax.Array, step: jax.typing.ArrayLike, seed: int = 0) -> jax.Array:
    r"""Round stochastically to bfloat16, with an exact mean.

    A number between neighbours :math:`a < x < b` becomes b with probability
    :math:`(x - a) / (b - a)`. Each element has its own low-discrepancy sequence of thresholds over
    the steps, cheaper than random numbers: the mean over n steps has an error of about 1/n instead
    of :math:`1 / \sqrt n`.

    Args:
      x: real floating-point, any shape and sharding; computed in float32.
      step: scalar integer, different each time.
      seed: a Python integer, different for each array.

    Returns:
      Shape of x, bfloat16. Infinities and NaN are unchanged.

    Raises:
      TypeError: if x is not real floating-point, or step or seed is not an integer.

    Example:
      A third of a step of bfloat16 above 1, rounded 300 times:

      >>> import jax, jax.numpy as jnp, natgalore_jax as ng
      >>> x = jnp.float32(1 + 2**-7 / 3)
      >>> rounded = jax.vmap(lambda step: ng.training.stochastic_round(x, step))(jnp.arange(300))
      >>> 99 <= int(jnp.sum(rounded > 1)) <= 101
      True
    """
    check_integer("seed", seed, minimum=0)
    if jnp.ndim(step) or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise TypeError(f"step must be a scalar integer, got {step!r}")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"stochastic_round takes floating-point arrays, got {x.dtype}")
    return rounded(x.astype(jnp.float32), jnp.dtype(jnp.bfloat16), step, seed)


def rounded(
    x: jax.Array, dtype: jnp.dtype, step: jax.typing.ArrayLike, salt: int | jax.Array
) -> jax.Array:
    """float32 numbers in a dtype: stochastically in bfloat16, else to nearest."""
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    cut = (bits + (dither(x.shape, step, salt, STRIDES[0]) >> 16)) & np.uint32(0xFFFF0000)
    cut = jax.lax.bitcast_convert_type(cut, jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(dtype)


@own_arithmetic
def apply_updates_stochastic(
    params: Any, updates: Any, step: jax.typing.ArrayLike, seed: int = 0
) -> Any:
    r"""``optax.apply_updates`` that rounds bfloat16 parameters with :func:`.stochastic_round`.

    A bfloat16 weight has a precision of eight bits: rounding to nearest loses every update of less
    than 1/512 of the weight. Here the sum is computed in float32, and a small update moves the
    weight at some of the steps. Pass float32 gradients to the optimizer, so that its updates are
    float32: rounding an update to bfloat16 first loses up to 0.4 percent. The moments are bfloat16
    even then, unless the optimizer was initialised with float32 parameters (:func:`.chain`).

    Args:
      params: the parameters. Parameters of other dtypes are updated by ``optax.apply_updates``.
      updates: a tree of the same structure, preferably float32 for bfloat16 parameters.
      step: scalar integer, the step count.
      seed: a Python integer.

    Returns:
      New parameters, in the same dtypes.

    Raises:
      TypeError, ValueError: as :func:`.stochastic_round`; if the trees differ.

    References:
      Zamirai et al., Revisiting bfloat16 training (2021).

    Example:
      >>> import jax.numpy as jnp, natgalore_jax as ng
      >>> params = {"w": jnp.ones(1000, jnp.bfloat16)}
      >>> updates = {"w": jnp.full(1000, 2.0**-7 / 8)}
      >>> new = ng.training.apply_updates_stochastic(params, updates, step=0)
      >>> 100 < int(jnp.sum(new["w"] > 1)) < 150
      True
    """
    check_integer("seed", seed, minimum=0)
    W, treedef = jax.tree.flatten(params)
    plain = treedef.flatten_up_to(optax.apply_updates(params, updates))
    U = treedef.flatten_up_to(updates)
    new = [
        stochastic_round(w.astype(jnp.float32) + u.astype(jnp.float32), step, seed * len(W) + leaf)
        if jnp.result_type(w) == jnp.bfloat16
        else p
        for leaf, (w, u, p) in enumerate(zip(W, U, plain, strict=True))
    ]
    return treedef.unflatten(new)
