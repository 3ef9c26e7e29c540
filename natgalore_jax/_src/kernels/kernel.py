"""The library's arithmetic: the same under every configuration of JAX, and compiled once."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def own_arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` under the configuration of JAX that the library is written for.

    Configuration that a program sets for itself would change our numbers (precision of products,
    random numbers) or make our kernels raise (promotion of ranks and dtypes). ``jax_enable_x64`` is
    the exception: numbers of 64 bits have to pass through, so that kernels write dtypes out
    wherever JAX has a default.

    Products of float32 have the native precision of the hardware, TF32 on GPUs and one pass of
    bfloat16 on TPUs, except where a kernel asks for more. What belongs to the user, an inner
    optimizer or a loss, is called outside.
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
    """A decorator for functions of the arrays of one parameter, at the top level of a module.

    A call without ``jax.jit`` then compiles nothing the second time: branches and loops that are
    closures, made anew at each call, would be compiled at each call. Within ``jax.jit`` it changes
    nothing, or with ``inline=False`` parameters of one shape share one part of the program.

    Args:
      *static: names of the arguments that are no arrays; their values are hashable.
      inline: whether the function is a part of what calls it.
    """

    def decorated(function):
        return own_arithmetic(jax.jit(function, static_argnames=static, inline=inline))

    return decorated
