"""Checks of arguments: what is required, what was received, which parameter."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_integer(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_number(name: str, value: Any, *, above: float | None = None) -> None:
    """A real number or a traced scalar; only the value of a concrete number can be checked."""
    if isinstance(value, (bool, str)) or (
        not isinstance(value, Real) and not hasattr(value, "dtype")
    ):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if above is not None and isinstance(value, Real) and not value > above:
        raise ValueError(f"{name} must be greater than {above:g}, got {value}")
