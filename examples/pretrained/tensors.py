"""Tensors by their names, in safetensors files of the Hugging Face layout."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from examples.common.errors import WeightsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

Tensors = dict[str, np.ndarray]


def read_tensors(directory: Path, optional: Collection[str] = ()) -> Tensors:
    """All tensors of `model.safetensors`, or of the files that its index names.

    Args:
      directory: where they are.
      optional: tensors that the index may name and no file hold.

    Raises:
      WeightsError: if a file is missing, cut off or damaged, or lacks a tensor of the index.
    """
    if (directory / SINGLE).exists():
        return _read_file(directory / SINGLE)
    if (directory / INDEX).exists():
        return _read_shards(directory / INDEX, optional)
    others = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".h5"))
    hint = f"; {', '.join(others)} is not read" if others else ""
    raise WeightsError(f"{directory}: no {SINGLE}{hint}")


def write_tensors(tensors: Mapping[str, np.ndarray], directory: Path) -> None:
    """Writes `model.safetensors`, as libraries for PyTorch expect it.

    Raises:
      WeightsError: if the file cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    path = directory / SINGLE
    path.touch()
    mode = path.stat().st_mode  # of any new file: safetensors makes one for its owner alone
    try:
        safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})
        path.chmod(mode)
    except safetensors.SafetensorError as error:  # No OSError, such as that of a full disk.
        raise WeightsError(f"{path}: cannot be written ({error})") from error


def _read_file(path: Path) -> Tensors:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        cut = _cut_off(path)
        why = f"{len(cut)} tensors are cut off: {', '.join(cut)}" if cut else str(error)
        raise WeightsError(f"{path}: not a complete safetensors file ({why})") from error
    except AttributeError as error:  # NumPy has no such number format: 8-bit floats, say.
        raise WeightsError(
            f"{path}: tensors of {error.name} are not read: convert them to bfloat16 or float32"
        ) from error


def _cut_off(path: Path) -> list[str]:
    """Tensors that the header says end behind the end of the file."""
    try:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        ends = {
            name: entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"
        }
        return [name for name, end in ends.items() if 8 + size + end > len(raw)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _read_shards(index: Path, optional: Collection[str]) -> Tensors:
    try:
        where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index}: not an index of tensors ({error!r})") from error
    tensors: Tensors = {}
    needed = {file for tensor, file in where.items() if tensor not in optional}
    for name in sorted(set(where.values())):
        path = index.parent / name
        if not path.exists():
            if name not in needed:
                continue
            raise WeightsError(f"{path}: no such file, which {index.name} names")
        tensors |= _read_file(path)
    missing = sorted(where.keys() - tensors.keys() - set(optional))
    if missing:
        raise WeightsError(f"{index.parent}: tensors of {index.name} are missing: {missing}")
    return tensors
