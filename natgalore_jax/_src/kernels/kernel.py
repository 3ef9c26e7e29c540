"""Decorators for the library's arithmetic: independent of JAX's configuration, compiled once."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def own_arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` under JAX's default configuration.

    A program's own configuration would change numbers (precision of products, random numbers) or
    make kernels raise (promotion of ranks and dtypes). ``jax_enable_x64`` is left alone because
    64-bit numbers have to pass through; therefore kernels write dtypes out.

    float32 products have the native precision of the hardware, TF32 on GPUs and one bfloat16 pass
    on TPUs, except where a kernel sets a precision. Inner optimizers and losses run outside.
    """

    @functools.wraps(function)
    def with_own_configuration(*args, **kwargs):
        with (
            jax.default_matmul_precision("default"),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.default_prng_impl("threefry2x32"),
        ):
            return function(*args, **kwargs)

    return with_own_configuration


def kernel(*static: str, inline: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a top-level function of the arrays of one parameter with ``jax.jit``.

    Outside ``jax.jit``, branches and loops over closures would compile at every call; a decorated
    function compiles once. Inside ``jax.jit`` it is inlined; with ``inline=False`` parameters of
    one shape share one computation of the program.

    Args:
      *static: names of static arguments; their values are hashable.
      inline: whether the function is inlined into its caller.
    """

    def decorated(function):
        return own_arithmetic(jax.jit(function, static_argnames=static, inline=inline))

    return decorated
