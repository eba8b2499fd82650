"""The weights of a Hugging Face directory: one `model.safetensors`, or shards listed by an index.

The safetensors library maps the files into memory and validates their headers (size, overlaps, coverage of
the file); what it refuses is a CheckpointError here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from edge_export.checkpoint.files import read_json
from edge_export.checkpoint.foreign import file_is, tensors_are, weights_beside
from edge_reasoner.errors import CheckpointError
from edge_reasoner.files import utf8_path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = ("F32", "F16", "BF16")
#: types of weights that are not quantized, only rare
_FLOATS = ("F64", "C64")
_QUANTIZED = "are these quantized weights? Give the original ones, or a GGUF file"
_MAX_FILES = 4096
_COMPARED_ROWS = 4096
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def weights_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a model directory. Raises CheckpointError if one or all are missing."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise CheckpointError(
            f"{directory}: no weights found; allowed are {SINGLE_FILE}, {INDEX_FILE} with its shards, "
            "or a .gguf file" + _also(weights_beside(directory))
        )
    names = sorted(set(read_json(index, _Index).weight_map.values()))
    if not names or len(names) > _MAX_FILES:
        raise CheckpointError(f"{index}: lists {len(names)} files; allowed are 1 to {_MAX_FILES}")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name[:80]!r}; allowed are .safetensors files beside it")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name}: missing, but {INDEX_FILE} lists it")
    return tuple(directory / name for name in names)


def _also(hint: str | None) -> str:
    return "" if hint is None else f"; {hint}"


def _unread_adapters(directory: Path) -> tuple[str, ...]:
    return tuple(
        f"{directory / name}: an adapter that is not used; merge it into the weights first"
        for name in _ADAPTER_FILES
        if (directory / name).is_file()
    )


class SafetensorsFiles:
    """`RawTensors` over a directory's safetensors files. Construction raises CheckpointError.

    `warnings` name weights files that lie beside these and are not read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.warnings = _unread_adapters(directory)
        self.files = weights_files(directory)
        self._handles: dict[str, tuple[Path, Any]] = {}
        for path in self.files:
            utf8_path(path, error=CheckpointError)  # the library encodes the path itself
            try:
                handle: Any = safe_open(path, framework="pt")
                for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    if name in self._handles:
                        raise CheckpointError(f"{path}: the tensor {name!r} is already in another shard")
                    self._handles[name] = (path, handle)
            except (SafetensorError, OSError) as error:
                what = file_is(path) or f"corrupt or truncated safetensors file: {error}"
                raise CheckpointError(f"{path}: {what}") from error
        if self.files[0].name != SINGLE_FILE:
            self._check_index()

    def _check_index(self) -> None:
        """Refuses an index that speaks of tensors its shards do not hold: they belong to another download."""
        index = self.directory / INDEX_FILE
        for name, file in read_json(index, _Index).weight_map.items():
            if name not in self._handles:
                raise CheckpointError(f"{index}: lists the tensor {name[:120]!r}, which no shard holds")
            if (found := self._handles[name][0].name) != file:
                raise CheckpointError(
                    f"{index}: says that the tensor {name[:120]!r} is in {file}, but {found} holds it"
                )

    def same_values(self, first: str, second: str) -> bool:
        """Whether two tensors are equal, element by element; reads both."""
        shape = self.shape(first)
        if shape != self.shape(second):
            return False
        steps = range(0, shape[0], _COMPARED_ROWS)
        return all(
            torch.equal(
                self.rows(first, start, min(start + _COMPARED_ROWS, shape[0])),
                self.rows(second, start, min(start + _COMPARED_ROWS, shape[0])),
            )
            for start in steps
        )

    def has(self, name: str) -> bool:
        """Whether a file has the tensor."""
        return name in self._handles

    def names(self) -> tuple[str, ...]:
        """Every tensor name."""
        return tuple(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape. Raises CheckpointError if it is missing or not of a weight's type."""
        path, view = self._view(name)
        if (dtype := view.get_dtype()) not in _DTYPES:
            raise CheckpointError(
                f"{path}: the tensor {name!r} is of type {dtype}; allowed are {', '.join(_DTYPES)}"
                + _also(None if dtype in _FLOATS else tensors_are(self._handles) or _QUANTIZED)
            )
        return tuple(view.get_shape())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as fresh float32. Raises CheckpointError if missing or unreadable."""
        path, view = self._view(name)
        try:
            stored: torch.Tensor = view[start:stop]
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path}: the tensor {name!r} cannot be read: {error}") from error
        return stored.to(torch.float32, copy=True).contiguous()

    def _view(self, name: str) -> tuple[Path, Any]:
        if name not in self._handles:
            raise CheckpointError(f"{self.directory}: there is no tensor {name!r} in its safetensors files")
        path, handle = self._handles[name]
        return path, handle.get_slice(name)
