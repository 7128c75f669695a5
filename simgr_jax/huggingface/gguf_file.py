"""A GGUF file, llama.cpp's format: its metadata, and its tensors, which are read on demand.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package dequantizes. Its reader is not
used, because it makes several objects of every token of the vocabulary (9 s for 49 thousand tokens) and does not stop
where a damaged length leads beyond the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize
from jaxtyping import Shaped

from simgr_jax.errors import UserError, first_line
from simgr_jax.workdir.read_files import require_file

# K-quants need rows of a multiple of 256 numbers; llama.cpp puts Q5_0 and Q5_1 in their place where a row is shorter.
TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_NOT_QUANTIZED = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
# More than any vocabulary has.
_MOST_ENTRIES = 2**24


class StoredTensor(NamedTuple):
    """A tensor as the file has it: a matrix of its last axis's rows, each quantized by itself.

    Attributes:
      type: one of TENSOR_TYPES.
      shape: in row-major order, the reverse of the file's.
      start: its first byte in the file.
    """

    file: Path
    type: str
    shape: tuple[int, ...]
    start: int

    def read(self, rows: slice | np.ndarray) -> Shaped[np.ndarray, "R C"]:
        """Rows in the file's dtype, or dequantized in float32. No other rows are read."""
        shape = math.prod(self.shape[:-1]), _row_bytes(self.type, self.shape[-1])
        # Mapped anew for each part: until it is closed, the pages of a mapping count as this process's memory.
        found = np.array(np.memmap(self.file, np.uint8, "r", self.start, shape)[rows])
        if self.type in _NOT_QUANTIZED:
            return found.view(_NOT_QUANTIZED[self.type])
        return dequantize(found, GGMLQuantizationType[self.type])


class GgufFile(NamedTuple):
    """
    Attributes:
      path: the file.
      metadata: numbers, strings, and lists of these, by key.
      tensors: by llama.cpp's names.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def dtype(self) -> str:
        """What its matrices are made of: "F32", "F16" or "BF16", which stands for the quantized types, too."""
        types = {tensor.type for tensor in self.tensors.values()} - {"F32"}
        return "F32" if not types else "F16" if types == {"F16"} else "BF16"


def read(path: Path) -> GgufFile:
    """Reads a file's metadata and the list of its tensors.

    Raises:
      UserError: it is missing or damaged, is not a GGUF file or only part of one, or a tensor's type is not supported.
    """
    require_file(path, "give a GGUF file, or the folder of a Hugging Face model")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _read(path, data)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check its permissions") from error
    except (struct.error, ValueError) as error:
        raise UserError(
            f"{path}: is not a complete GGUF file ({first_line(error)[:150]}); copy or download it again"
        ) from error
    if found.metadata.get("split.count", 1) != 1:
        raise UserError(
            f"{path}: is one of {found.metadata['split.count']} parts of a model; make one file of them with "
            "`llama-gguf-split --merge`"
        )
    return found


class _Values:
    """Values that follow one another in a file. Raises struct.error or ValueError beyond its end."""

    def __init__(self, data: mmap.mmap):
        self._data, self.position = data, 0

    def numbers(self, letter: str, count: int = 1) -> list[Any]:
        """
        Args:
          letter: of the `struct` module.
        """
        if count > _MOST_ENTRIES:
            raise ValueError(f"a list of {count} entries")
        code = f"<{count}{letter}"
        found = struct.unpack_from(code, self._data, self.position)
        self.position += struct.calcsize(code)
        return list(found)

    def string(self) -> str:
        (length,) = self.numbers("Q")
        if length > len(self._data) - self.position:
            raise ValueError("it ends within a string")
        self.position += length
        return self._data[self.position - length : self.position].decode()

    def value(self) -> Any:
        """A value of the metadata, after its type."""
        kind = GGUFValueType(*self.numbers("I"))
        if kind != GGUFValueType.ARRAY:
            return self._entries(kind, 1)[0]
        (entry,), (count,) = self.numbers("I"), self.numbers("Q")
        return self._entries(GGUFValueType(entry), count)

    def _entries(self, kind: GGUFValueType, count: int) -> list[Any]:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], count)
        if kind != GGUFValueType.STRING or count > _MOST_ENTRIES:
            raise ValueError(f"a list of {count} entries of the type {kind.name}")
        return [self.string() for _ in range(count)]


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    """
    Raises:
      struct.error, ValueError: the file is damaged.
      UserError: it is whole, but not supported.
    """
    values = _Values(data)
    if data[:4] != b"GGUF":
        raise UserError(f'{path}: is not a GGUF file, which begins with "GGUF"; give one, or a Hugging Face folder')
    _, version = values.numbers("I", 2)
    if version not in _VERSIONS:
        order = "is in big-endian order" if version & 0xFFFF == 0 else f"has version {version} of the format"
        raise UserError(f"{path}: {order}, which is not supported; convert the model again with llama.cpp")
    tensor_count, metadata_count = values.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = values.string()
        if key in metadata:
            raise ValueError(f"{key} occurs twice")
        metadata[key] = values.value()
    headers = {}
    for _ in range(tensor_count):
        name = values.string()
        if name in headers:
            raise ValueError(f"{name} occurs twice")
        shape = tuple(reversed(values.numbers("Q", *values.numbers("I"))))
        headers[name] = shape, *values.numbers("I"), *values.numbers("Q")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment = {alignment}")
    start = math.ceil(values.position / alignment) * alignment
    tensors = {
        name: _tensor(path, name, shape, number, start + offset, len(data))
        for name, (shape, number, offset) in headers.items()
    }
    return GgufFile(path, metadata, tensors)


def _tensor(path: Path, name: str, shape: tuple[int, ...], number: int, start: int, size: int) -> StoredTensor:
    """
    Args:
      number: of the tensor's type.
      size: of the file, in bytes.

    Raises:
      ValueError: the tensor is not in the file.
      UserError: its type is not supported.
    """
    found = GGMLQuantizationType(number).name if number in list(GGMLQuantizationType) else f"number {number}"
    if found not in TENSOR_TYPES:
        raise UserError(
            f"{path}:{name}: has the tensor type {found}; use a file of {', '.join(TENSOR_TYPES)}, such as the model's "
            "Q8_0 or Q4_K_M"
        )
    if not shape or min(shape) < 1 or shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[found]][0]:
        raise ValueError(f"{name} has the shape {list(shape)}")
    if start + math.prod(shape[:-1]) * _row_bytes(found, shape[-1]) > size:
        raise ValueError(f"it ends before {name} does")
    return StoredTensor(path, found, shape, start)


def _row_bytes(kind: str, numbers: int) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return numbers // block * size
