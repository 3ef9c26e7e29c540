"""Dependence of the outputs of a function on its inputs."""

import jax
import jax.numpy as jnp
import pytest

from natgalore_jax._src.params.dependence import sources_of_outputs

A, B, C = 1, 2, 4


def sources(function):
    """Bit sets of the outputs of a function of three scalars a, b and c."""
    jaxpr = jax.make_jaxpr(function)(1.0, 2.0, 3.0)
    return sources_of_outputs(jaxpr.jaxpr, [A, B, C])


def carried(a, b, c):
    """b reaches the first value in the second round, through the second one."""
    return jax.lax.fori_loop(0, 3, lambda i, x: (x[0] + x[1], x[1] * b, x[2]), (a, a, c))


def repeated(a, b, c):
    carry, ys = jax.lax.scan(lambda x, y: ((x[0] + x[1], b), y + c), (a, a), jnp.ones(3))
    return *carry, ys


def until(a, b, c):
    """The number of iterations decides the result of a loop."""
    return jax.lax.while_loop(lambda x: x[0] < c, lambda x: (x[0] + 1, x[1] * 2), (a, b))


@jax.custom_jvp
def with_derivative(x, y):
    return x, y * 2


with_derivative.defjvp(lambda primals, tangents: (with_derivative(*primals), tangents))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b, c: (a + b, c * 2, 1.0), [A | B, C, 0]),
        (lambda a, b, c: jax.jit(lambda x, y: (y, x))(a + b, c), [C, A | B]),
        (lambda a, b, c: jax.checkpoint(lambda x, y: (jnp.sin(y), x))(a, b), [B, A]),
        (lambda a, b, c: with_derivative(a, b), [A, B]),
        (lambda a, b, c: jax.lax.cond(a > 0, lambda: (b, 1.0), lambda: (c, 2.0)), [A | B | C, A]),
        (carried, [A | B, A | B, C]),
        (repeated, [A | B, B, C]),
        (until, [A | C, A | B | C]),
        (lambda a, b, c: jnp.stack([a, b])[0], [A | B]),  # No more than by operation.
    ],
)
def test_sources(function, expected):
    assert sources(function) == expected
