"""A GGUF file: its header, checked against the file before anything is believed, and its tensors, row by row.

Layout (little-endian, versions 2 and 3):

    "GGUF"  version u32  tensor_count u64  kv_count u64
    kv_count × (key string, type u32, value)
    tensor_count × (name string, n_dims u32, dims u64 × n_dims, type u32, offset u64)
    padding to `general.alignment`, then the tensors' data

The `gguf` package reads these too, and its dequantization is what we use; its header reader is not, because
it follows the counts it is given: a hostile array length makes it loop and allocate without end, a truncated
file yields empty arrays instead of an error, and it keeps three array objects per vocabulary entry (a
262,144-token vocabulary costs gigabytes). Here every count is compared with the bytes that are left.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from edge_export.checkpoint.foreign import file_is
from edge_reasoner.errors import CheckpointError

#: bool | int | float | str | list[str] | numpy array of a numeric type; bytes where a string is not UTF-8:
#: that is no fault until somebody needs it as text
MetadataValue = Any

_MAX_METADATA_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 16
_MAX_ARRAY_ITEMS = 1 << 24
_MAX_ARRAY_STRINGS = 1 << 22
_MAX_KEY_BYTES = 1 << 16
_MAX_ALIGNMENT_BYTES = 1 << 20
_MAX_DIMENSIONS = 4
#: dequantized at once: few enough that ggml's many temporaries stay in the cache
_CHUNK_ELEMENTS = 1 << 18

#: GGUF tensor type → name of a type that llama.cpp wrote once, and when it was removed
_REMOVED_TYPES: Mapping[int, tuple[str, str]] = {
    4: ("Q4_2", "in 2023"),
    5: ("Q4_3", "in 2023"),
    31: ("Q4_0_4_4", "in December 2024"),
    32: ("Q4_0_4_8", "in December 2024"),
    33: ("Q4_0_8_8", "in December 2024"),
    36: ("IQ4_NL_4_4", "in December 2024"),
    37: ("IQ4_NL_4_8", "in December 2024"),
    38: ("IQ4_NL_8_8", "in December 2024"),
}
#: how the files of GGUF's predecessors begin
_OLDER_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg", b"ggml", b"ggmf", b"ggjt")

_STRING, _ARRAY = 8, 9
#: GGUF value type → numpy type
_SCALARS: Mapping[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in torch's order (rows first); `type_name` is ggml's (Q4_K)."""

    shape: tuple[int, ...]
    type_name: str
    offset_bytes: int
    size_bytes: int


class _Cursor:
    """Reads the header front to back and never past the end of the file."""

    def __init__(self, data: npt.NDArray[np.uint8], path: Path) -> None:
        self._data = data
        self.path = path
        self.offset = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: corrupt GGUF file: {what} (at byte {self.offset:,})")

    def take(self, count_bytes: int, what: str) -> npt.NDArray[np.uint8]:
        left = len(self._data) - self.offset
        if count_bytes > left:
            raise CheckpointError(
                f"{self.path}: truncated GGUF file: {what} needs {count_bytes:,} bytes at byte "
                f"{self.offset:,}, but the file ends {left:,} bytes later"
            )
        start, self.offset = self.offset, self.offset + count_bytes
        return self._data[start : self.offset]

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", bytes(self.take(4, what)))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", bytes(self.take(8, what)))[0])

    def name(self, what: str) -> str:
        """A short string that has to be text."""
        length = self.u64(f"the length of {what}")
        if length > _MAX_KEY_BYTES:
            raise self.fail(f"{what} is {length:,} bytes long, at most {_MAX_KEY_BYTES:,} are allowed")
        try:
            return bytes(self.take(length, what)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 text") from error

    def text(self, what: str) -> str | bytes:
        """A string of any length: its bytes where they are not UTF-8."""
        data = bytes(self.take(self.u64(f"the length of {what}"), what))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data


def _strings(cursor: _Cursor, count: int, key: str) -> list[str | bytes]:
    what = f"an item of {key!r}"
    if count > _MAX_ARRAY_STRINGS:
        raise cursor.fail(f"{key!r} claims {count:,} strings, at most {_MAX_ARRAY_STRINGS:,} are allowed")
    return [cursor.text(what) for _ in range(count)]


def _array(cursor: _Cursor, key: str) -> MetadataValue:
    item_type = cursor.u32(f"the item type of {key!r}")
    count = cursor.u64(f"the length of {key!r}")
    if count > _MAX_ARRAY_ITEMS:
        raise cursor.fail(f"{key!r} claims {count:,} items, at most {_MAX_ARRAY_ITEMS:,} are allowed")
    if item_type == _STRING:
        return _strings(cursor, count, key)
    if item_type not in _SCALARS:
        raise cursor.fail(f"{key!r} is an array of unknown type {item_type}")
    dtype = np.dtype(_SCALARS[item_type])
    return cursor.take(count * dtype.itemsize, repr(key)).view(dtype).copy()


def _value(cursor: _Cursor, key: str) -> MetadataValue:
    value_type = cursor.u32(f"the type of {key!r}")
    if value_type == _STRING:
        return cursor.text(repr(key))
    if value_type == _ARRAY:
        return _array(cursor, key)
    if value_type not in _SCALARS:
        raise cursor.fail(f"{key!r} has the unknown type {value_type}")
    dtype = np.dtype(_SCALARS[value_type])
    return cursor.take(dtype.itemsize, repr(key)).view(dtype)[0].item()


def _by_name(path: Path) -> str | None:
    """What a file of a model directory is, that was given in the directory's place."""
    if path.suffix in (".json", ".model", ".jinja", ".txt", ".md"):
        return "not a model; give its directory, or a .gguf file"
    return None


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Magic and version, checked; the numbers of tensors and of metadata entries."""
    path, magic = cursor.path, bytes(cursor.take(4, "the magic"))
    if magic in _OLDER_MAGICS:
        raise CheckpointError(f"{path}: an older format than GGUF (GGML, GGJT); convert the model again")
    if magic != b"GGUF":
        what = file_is(path) or _by_name(path) or "not a GGUF file: it does not begin with 'GGUF'"
        raise CheckpointError(f"{path}: {what}")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(
            f"{path}: a big-endian GGUF file; allowed are little-endian ones; llama.cpp's "
            "gguf_convert_endian.py converts it"
        )
    if version not in (2, 3):
        raise CheckpointError(
            f"{path}: GGUF version {version} is not supported; allowed are 2 and 3, little-endian"
        )
    tensor_count, entry_count = cursor.u64("the tensor count"), cursor.u64("the metadata count")
    if tensor_count > _MAX_TENSORS or entry_count > _MAX_METADATA_ENTRIES:
        raise cursor.fail(
            f"the header claims {tensor_count:,} tensors and {entry_count:,} metadata entries, at most "
            f"{_MAX_TENSORS:,} and {_MAX_METADATA_ENTRIES:,} are allowed"
        )
    return tensor_count, entry_count


def gguf_architecture(path: Path) -> str:
    """`general.architecture`, or "" where the file has none: it comes first, so that little else is read."""
    cursor = _Cursor(_map_file(path), path)
    _, entry_count = _read_counts(cursor)
    for _ in range(entry_count):
        key = cursor.name("a metadata key")
        value = _value(cursor, key)
        if key == "general.architecture":
            return value if isinstance(value, str) else ""
    return ""


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for _ in range(count):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise cursor.fail(f"the metadata key {key!r} appears twice")
        metadata[key] = _value(cursor, key)
    return metadata


def _tensor_type(cursor: _Cursor, name: str) -> gguf.GGMLQuantizationType:
    raw = cursor.u32(f"the type of tensor {name!r}")
    try:
        return gguf.GGMLQuantizationType(raw)
    except ValueError as error:
        if raw in _REMOVED_TYPES:
            removed, when = _REMOVED_TYPES[raw]
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r} is of the type {removed}, which was removed from "
                f"llama.cpp {when}; quantize the model again from its original weights (Q4_0, Q4_K_M)"
            ) from error
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} has the unknown type {raw}: the file is corrupt, or newer "
            "than the gguf package that reads it"
        ) from error


def _read_tensor(cursor: _Cursor) -> tuple[str, GgufTensor]:
    """One tensor's description; its offset still counts from the start of the data."""
    name = cursor.name("a tensor name")
    dimensions = cursor.u32(f"the rank of tensor {name!r}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name!r} has {dimensions} dimensions, allowed are 1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(f"the shape of tensor {name!r}") for _ in range(dimensions))[::-1]
    kind = _tensor_type(cursor, name)
    offset = cursor.u64(f"the offset of tensor {name!r}")
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block_size or not all(shape):
        raise cursor.fail(f"tensor {name!r} of shape {list(shape)} cannot be of type {kind.name}")
    return name, GgufTensor(shape, kind.name, offset, prod(shape) // block_size * block_bytes)


def _alignment(cursor: _Cursor, metadata: Mapping[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(value) is not int or not 1 <= value <= _MAX_ALIGNMENT_BYTES or value & (value - 1):
        raise cursor.fail(f"general.alignment is {value!r}, allowed are powers of two up to 1 MiB")
    return value


def _read_tensors(
    cursor: _Cursor, count: int, metadata: Mapping[str, MetadataValue], size_bytes: int, path: Path
) -> dict[str, GgufTensor]:
    described: dict[str, GgufTensor] = {}
    for _ in range(count):
        name, tensor = _read_tensor(cursor)
        if name in described:
            raise cursor.fail(f"tensor {name!r} appears twice")
        described[name] = tensor
    alignment = _alignment(cursor, metadata)
    start = -(-cursor.offset // alignment) * alignment
    placed = {}
    for name, tensor in described.items():
        begin = start + tensor.offset_bytes
        if begin + tensor.size_bytes > size_bytes:
            raise CheckpointError(
                f"{path}: truncated GGUF file: tensor {name!r} ends at byte {begin + tensor.size_bytes:,}, "
                f"but the file has {size_bytes:,}"
            )
        placed[name] = GgufTensor(tensor.shape, tensor.type_name, begin, tensor.size_bytes)
    return placed


def _map_file(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if path.stat().st_size < 24 and path.suffix == ".gguf":
            raise CheckpointError(f"{path}: truncated GGUF file: shorter than a GGUF header")
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


class GgufFile:
    """An open GGUF file: `metadata` by key, `tensors` by name (both checked), and the data, memory-mapped.

    Raises CheckpointError on construction for anything that is not a whole, well-formed GGUF file of
    version 2 or 3. Costs: the header only; no tensor data is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map_file(path)
        cursor = _Cursor(self._data, path)
        tensor_count, entry_count = _read_counts(cursor)
        self.metadata: Mapping[str, MetadataValue] = _read_metadata(cursor, entry_count)
        self.tensors: Mapping[str, GgufTensor] = _read_tensors(
            cursor, tensor_count, self.metadata, len(self._data), path
        )

    def has(self, name: str) -> bool:
        """Whether the file has the tensor."""
        return name in self.tensors

    def names(self) -> tuple[str, ...]:
        """Every tensor name."""
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in torch's order. Raises CheckpointError if there is no such tensor."""
        return self._find(name).shape

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors have the same type, shape and data."""
        a, b = self._find(first), self._find(second)
        if (a.type_name, a.shape) != (b.type_name, b.shape):
            return False
        return bool(np.array_equal(self._bytes(a, 0, a.size_bytes), self._bytes(b, 0, b.size_bytes)))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) along the first axis as a fresh float32 tensor, dequantized chunk by chunk.

        Raises CheckpointError if the tensor is missing or of a type that is not a weight.
        """
        tensor = self._find(name)
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_elements = prod(tensor.shape[1:]) if len(tensor.shape) > 1 else 1
        if row_elements % block_size:  # a quantized vector: its one axis is a row of blocks
            return self._vector(name, kind)[start:stop].clone()
        row_bytes = row_elements // block_size * block_bytes
        result = np.empty((stop - start, row_elements), dtype=np.float32)
        step = max(1, _CHUNK_ELEMENTS // row_elements)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            raw = self._bytes(tensor, first * row_bytes, last * row_bytes).reshape(1, -1)
            result[first - start : last - start] = self._dequantize(name, raw, kind).reshape(
                last - first, row_elements
            )
        return torch.from_numpy(result).reshape(stop - start, *tensor.shape[1:])

    def _vector(self, name: str, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
        """A whole quantized vector as float32."""
        tensor = self._find(name)
        raw = self._bytes(tensor, 0, tensor.size_bytes).reshape(1, -1)
        return torch.from_numpy(self._dequantize(name, raw, kind).reshape(tensor.shape).copy())

    def check_dequantizable(self, name: str) -> None:
        """Raise CheckpointError if the tensor's type cannot be turned into float32 (costs one zero block)."""
        kind = gguf.GGMLQuantizationType[self._find(name).type_name]
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        self._dequantize(name, np.zeros((1, block_bytes), dtype=np.uint8), kind)

    def _find(self, name: str) -> GgufTensor:
        try:
            return self.tensors[name]
        except KeyError as error:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r} in this file") from error

    def _bytes(self, tensor: GgufTensor, start: int, stop: int) -> npt.NDArray[np.uint8]:
        return self._data[tensor.offset_bytes + start : tensor.offset_bytes + stop]

    def _dequantize(
        self, name: str, raw: npt.NDArray[np.uint8], kind: gguf.GGMLQuantizationType
    ) -> npt.NDArray[np.float32]:
        try:
            # Hostile scales make 0·inf warnings; non-finite results are refused by the source.
            with np.errstate(all="ignore"):
                return np.asarray(gguf.quants.dequantize(raw, kind), dtype=np.float32)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of type {kind.name}, which cannot be read as weights; "
                "allowed are F32, F16, BF16 and ggml's Q, IQ and TQ types"
            ) from error
