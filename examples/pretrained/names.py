"""Which tensor of a file is which parameter of a model, and everything that does not fit.

Parameters are a flat dict by path, as `flax.traverse_util.flatten_dict` makes it.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.common.errors import WeightsError

Path = tuple[Any, ...]


class Stored(NamedTuple):
    """How a parameter stands in a file."""

    names: tuple[str, ...]  # Of one tensor, or of one for each layer of a stack (layers, ...).
    stacked: bool = False
    transposed: bool = False  # Linear maps are (out, in) in PyTorch, kernels are (in, out).


class Filled(NamedTuple):
    """Parameters from a file."""

    params: dict[Path, jax.Array]
    new: tuple[str, ...]  # Tensors that the file lacks; the parameters were left out.
    unused: tuple[str, ...]  # Tensors of the file that are no parameter.


def fill(
    expected: Mapping[Path, jax.ShapeDtypeStruct],
    stored: Mapping[Path, Stored],
    tensors: Mapping[str, np.ndarray],
    *,
    optional: Collection[Path] = (),
    remedy: str = "",
    source: str = "weights",
) -> Filled:
    """Parameters of the expected shapes and dtypes.

    Args:
      expected: shape and dtype of every parameter.
      stored: where each of them stands.
      tensors: what the file holds, in any floating-point dtype.
      optional: parameters that may be missing, such as a classifier that is trained anew.
      remedy: for messages, what helps if one of these does not fit.
      source: the name of the file, for messages.

    Raises:
      WeightsError: names all tensors that are missing, of another shape, or no numbers.
    """
    params, new, problems, remedies = {}, [], [], set()
    for path, like in expected.items():
        names, stacked, transposed = stored[path]
        missing = [name for name in names if name not in tensors]
        if missing and path in optional:
            new += missing
            continue
        shape = like.shape[1:] if stacked else like.shape
        shape = shape[::-1] if transposed else shape
        found = [_problem(name, tensors.get(name), shape) for name in names]
        found = [problem for problem in found if problem is not None]
        if found and path in optional:
            remedies = {remedy}
        problems += found
        if not problems:
            parts = [tensors[name].T if transposed else tensors[name] for name in names]
            array = np.stack(parts) if stacked else parts[0]
            params[path] = jnp.asarray(array, like.dtype)
    if problems:
        raise WeightsError(
            f"{source}: {len(problems)} tensors do not fit: {'; '.join([*problems, *remedies])}"
        )
    used = {name for path in expected for name in stored[path].names}
    return Filled(params, tuple(new), tuple(sorted(tensors.keys() - used)))


def tensors_of(
    params: Mapping[Path, jax.Array], stored: Mapping[Path, Stored]
) -> dict[str, np.ndarray]:
    """The tensors of a file from parameters: the inverse of :func:`fill`."""
    tensors = {}
    for path, array in params.items():
        names, stacked, transposed = stored[path]
        parts = np.asarray(array) if stacked else [np.asarray(array)]
        tensors |= {
            name: part.T if transposed else part for name, part in zip(names, parts, strict=True)
        }
    return tensors


def _problem(name: str, tensor: np.ndarray | None, shape: tuple[int, ...]) -> str | None:
    if tensor is None:
        return f"{name} is missing"
    if tensor.shape != shape:
        return f"{name} is {tensor.shape}, expected {shape}"
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"{name} is of {tensor.dtype}, expected floating-point numbers"
    return None
