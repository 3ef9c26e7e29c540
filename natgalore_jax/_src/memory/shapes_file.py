"""Names and shapes of parameters from a JSON file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

DTYPES = ("float32", "bfloat16", "float16")


def read_shapes(file: str | Path, dtype: str) -> dict[str, Any]:
    """A tree of ``jax.ShapeDtypeStruct`` from names and shapes.

    Args:
      file: a JSON object. A value is a shape, ``[512, 512]``; an object with a shape and its dtype,
        ``{"shape": [512], "dtype": "float32"}``; or an object of further names.
      dtype: of parameters without a dtype.

    Raises:
      OSError: if the file cannot be read.
      ValueError: for any other content, with the name of the parameter.
    """
    try:
        content = json.loads(Path(file).read_text("utf-8"), object_pairs_hook=_unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: an object of names and shapes is required, got {_show(content)}")
    if not jax.tree.leaves(shapes := _tree(f"{file}: ", (), content, dtype)):
        raise ValueError(f"{file}: at least one parameter is required, got {_show(content)}")
    return shapes


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"keys must be unique, duplicate key: {', '.join(map(repr, repeated))}")
    return dict(pairs)


def _tree(file: str, path: tuple[str, ...], value: Any, dtype: str) -> Any:
    where = file + "/".join(path)
    if isinstance(value, dict) and isinstance(value.get("shape"), list):
        if unknown := sorted(value.keys() - {"shape", "dtype"}):
            raise ValueError(f"{where} has a shape and, at most, a dtype; got {', '.join(unknown)}")
        return _leaf(where, value["shape"], value.get("dtype", dtype))
    if isinstance(value, dict):
        return {name: _tree(file, (*path, name), entry, dtype) for name, entry in value.items()}
    return _leaf(where, value, dtype)


def _leaf(where: str, shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    # isinstance(True, int) holds, and True is not a size: compare types.
    if not isinstance(shape, list) or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(
            f"{where}: a shape is a list of positive integers, such as [512, 512], "
            f"got {_show(shape)}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(DTYPES)}, got {_show(dtype)}")
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
