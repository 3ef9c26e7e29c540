"""Checks of arguments; errors name the requirement, the value and the parameter."""

import contextlib
import math
from numbers import Integral, Real
from typing import Any, get_args

import jax
import jax.numpy as jnp

_INJECTED = (
    "; it shapes the state or the program: under optax.inject_hyperparams pass "
    "static_args=natgalore_jax.structural_args(factory)"
)


def check_static(name: str, value: Any, kind: str) -> None:
    """Check that what shapes the state or the program is no array, not even a traced one."""
    if isinstance(value, jax.Array):
        raise TypeError(f"{name} must be {kind}, got the array {value}{_INJECTED}")


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    check_static(name, value, "a Python integer")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if maximum is not None and int(value) > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")


def check_transformation(name: str, value: Any) -> None:
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(f"{name} must be a gradient transformation, got {value!r}")


def check_interval(name: str, value: Any) -> None:
    """Check a number of steps; step counts are int32 and saturate."""
    check_integer(name, value, minimum=1, maximum=2**31 - 1)


def check_boolean(name: str, value: Any) -> None:
    check_static(name, value, "True or False")
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Check for one of some names: a ``Literal``, or a sequence."""
    choices = get_args(choices) or choices
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_float_dtype(name: str, value: Any, others: str = "") -> None:
    """Check for a floating-point dtype, or None for the default."""
    check_static(name, value, "a dtype")
    try:
        is_float = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise TypeError(f"{name} must be a floating-point dtype{others}, got {value!r}")


def check_stored_dtype(name: str, value: Any) -> None:
    """Check for a floating-point dtype of 16 bits or more, int8, int4, or None for the default."""
    if not isinstance(value, jax.Array):
        with contextlib.suppress(TypeError):
            if jnp.dtype(value) in (jnp.int8, jnp.int4):
                return
    check_float_dtype(name, value, ", int8 or int4")
    if value is not None and jnp.finfo(value).bits < 16:
        raise TypeError(
            f"{name} must be a floating-point dtype of 16 bits or more, int8 or int4, got {value!r}"
        )


def check_number(
    name: str, value: Any, *, above: float | None = None, below: float | None = None
) -> None:
    """Check for a real number or a scalar array; values of traced arrays are not checked."""
    _check_scalar(name, value)
    if not isinstance(value, jax.core.Tracer):
        if above is not None and not float(value) > above:
            raise ValueError(f"{name} must be greater than {above:g}, got {value}")
        if below is not None and not float(value) < below:
            raise ValueError(f"{name} must be less than {below:g}, got {value}")
    if isinstance(value, Real) and math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value}")


def check_seed(value: Any) -> None:
    """Check for a seed; without x64 ``jax.random.key`` would drop higher bits."""
    check_integer("seed", value, minimum=0, maximum=2**32 - 1)


def check_rates(learning_rate: Any, weight_decay: Any = 0.0) -> None:
    """Check for numbers or schedules, which Optax takes unchecked."""
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not callable(value):
            check_number(name, value)


def check_decay(name: str, value: Any) -> None:
    """Check for a number in [0, 1); values of traced arrays are not checked."""
    _check_scalar(name, value)
    if not isinstance(value, jax.core.Tracer) and not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {value}")


def check_growth_limit(value: Any) -> None:
    if value is not None:
        check_number("norm_growth_limit", value, above=1.0)


def check_damping(value: Any) -> None:
    if not callable(value):
        check_number("damping", value, above=0.0, below=math.inf)


def check_eps(name: str, value: Any) -> None:
    """Check for a number that is not negative; values of traced arrays are not checked."""
    check_number(name, value)
    if not isinstance(value, jax.core.Tracer) and float(value) < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def _check_scalar(name: str, value: Any) -> None:
    is_array = hasattr(value, "dtype") and getattr(value, "ndim", None) == 0
    if isinstance(value, (bool, str)) or not (isinstance(value, Real) or is_array):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def check_adam(b1: Any, b2: Any, eps: Any, mu_dtype: Any = None) -> None:
    """Check the arguments that ``optax.scale_by_adam`` takes unchecked."""
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_eps("eps", eps)
    check_float_dtype("mu_dtype", mu_dtype)


def check_unused(name: str, value: Any, default: Any, where: str) -> None:
    """Check that an ignored argument is at its default.

    Arrays pass, because ``optax.inject_hyperparams`` makes arrays of defaults too.
    """
    if value is default or (default is not None and isinstance(value, jax.Array)):
        return
    if default is None or value != default:
        raise ValueError(f"{name} has no effect {where}: leave it at {default!r}, got {value!r}")
