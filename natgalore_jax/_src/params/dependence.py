"""Dependence of a function's outputs on its inputs, read from its jaxpr.

A set of inputs is an integer with one bit for each input, so that unions are cheap.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

from jax.extend import core


def sources_of_outputs(jaxpr: core.Jaxpr, sources: Sequence[int]) -> list[int]:
    """Sources of each output, given the sources of each input.

    The result is conservative: an operation without a rule below is assumed to use all of its
    operands for all of its results.

    Args:
      jaxpr: of the function.
      sources: one bit set for each input, 0 for an irrelevant input.

    Returns:
      One bit set for each output: the union over the inputs that reach it.
    """
    known = dict(zip(jaxpr.invars, sources, strict=True))

    def read(variable: Any) -> int:
        return 0 if isinstance(variable, core.Literal) else known.get(variable, 0)

    for equation in jaxpr.eqns:
        results = _of_equation(equation, [read(v) for v in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _of_equation(equation: Any, inputs: list[int]) -> list[int]:
    params = equation.params
    match equation.primitive.name:
        case "cond":
            branches = [sources_of_outputs(b.jaxpr, inputs[1:]) for b in params["branches"]]
            return [inputs[0] | _union(outs) for outs in zip(*branches, strict=True)]
        case "while":
            nc, nb = params["cond_nconsts"], params["body_nconsts"]
            tested, constants, carry = inputs[:nc], inputs[nc : nc + nb], inputs[nc + nb :]
            while True:
                (goes_on,) = sources_of_outputs(params["cond_jaxpr"].jaxpr, tested + carry)
                new = sources_of_outputs(params["body_jaxpr"].jaxpr, constants + carry)
                new = [a | b | goes_on for a, b in zip(carry, new, strict=True)]
                if new == carry:
                    return carry
                carry = new
        case "scan":
            nc, nk = _constants_and_carry(params)
            constants, carry, slices = inputs[:nc], inputs[nc : nc + nk], inputs[nc + nk :]
            while True:
                out = sources_of_outputs(params["jaxpr"].jaxpr, constants + carry + slices)
                new = [a | b for a, b in zip(carry, out[:nk], strict=True)]
                if new == carry:
                    return out
                carry = new
    called = list(core.jaxprs_in_params(params))  # by jit, checkpoint, custom derivatives, ...
    if len(called) == 1:
        (inner,) = called
        arity = (len(inner.invars), len(inner.outvars))
        if arity == (len(inputs), len(equation.outvars)):
            return sources_of_outputs(inner, inputs)
    return [_union(inputs)] * len(equation.outvars)


def _constants_and_carry(params: Any) -> tuple[int, int]:
    """Numbers of constants and of carried operands of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()  # trees in jax 0.12
    return len(list(constants)), len(list(carry))


def _union(sets: Sequence[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)
