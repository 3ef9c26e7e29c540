"""Metadata and tensors of a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from examples.common.errors import WeightsError
from examples.pretrained.tensors import Tensors

# GGUFReader checks little: these are what a damaged file ends in.
_DAMAGED = (ValueError, IndexError, KeyError, OverflowError, MemoryError)


class Gguf(NamedTuple):
    """An open file; tensors stay on disk until they are read."""

    path: Path
    metadata: Mapping[str, Any]
    stored: Mapping[str, gguf.ReaderTensor]

    @property
    def types(self) -> dict[str, int]:
        """How many tensors are stored in which way: Q4_1 and the like are rounded weights."""
        names = [tensor.tensor_type.name for tensor in self.stored.values()]
        return {name: names.count(name) for name in sorted(set(names))}

    def tensors(self) -> Tensors:
        """All tensors in float32, what was rounded decoded; linear maps are (out, in).

        Raises:
          WeightsError: if a tensor is stored in a way that `gguf` cannot decode.
        """
        decoded = {}
        for name, tensor in self.stored.items():
            try:
                array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise WeightsError(
                    f"{self.path}: {name} is stored as {tensor.tensor_type.name}, which cannot be "
                    "decoded"
                ) from error
            decoded[name] = np.asarray(array, np.float32)
        return decoded


def open_gguf(path: Path) -> Gguf:
    """Reads the metadata and where the tensors are.

    Raises:
      WeightsError: if it is no GGUF file, or cut off or damaged; names the tensors that are not
        all there.
    """
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}") from error
    except _DAMAGED as error:
        raise WeightsError(f"{path}: not a complete GGUF file ({error})") from error
    return Gguf(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


class _Reader(gguf.GGUFReader):
    """Says which tensors are cut off, where its parent fails over the shape of the first."""

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        cut = []
        for field in fields:
            _, _, _, dims, kind, offset = field.parts
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
            size = int(np.prod(dims)) * block_bytes // per_block
            if int(start_offs) + int(offset[0]) + size > len(self.data):
                cut.append(field.name)
        if cut:
            raise ValueError(f"{len(cut)} tensors are cut off: {', '.join(cut)}")
        super()._build_tensors(start_offs, fields)
