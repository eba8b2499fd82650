"""Truncated, corrupt and hostile weights files: one CheckpointError each, soon and in little memory."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_models import make_model, write_gguf

from edge_export.checkpoint.gguf_file import GgufFile
from edge_export.checkpoint.load import load_checkpoint
from edge_export.model.tensors import tensor_shapes
from edge_reasoner.errors import CheckpointError

MODEST_BYTES = 64 << 20
RELAXED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory) -> Path:
    """A whole tiny GGUF file with a token list."""
    extra = {
        "add_token_list": [f"t{i}" for i in range(96)],
        "add_token_types": [1] * 96,
    }
    return write_gguf(make_model("llama"), tmp_path_factory.mktemp("gguf") / "good.gguf", extra=extra)


@pytest.fixture(scope="module")
def good_directory(tmp_path_factory) -> Path:
    """A whole tiny Hugging Face directory."""
    directory = tmp_path_factory.mktemp("hf")
    make_model("llama").save_pretrained(directory)
    return directory


def refuses(path: Path) -> str:
    """The one-line message with which `path` is refused, in good time and modest memory."""
    tracemalloc.start()
    begun_s = time.process_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun_s < 20 and peak_bytes < MODEST_BYTES
    message = str(caught.value)
    assert "\n" not in message and str(path.parent) in message
    return message


def load_all(path: Path) -> None:
    """Open a checkpoint and read every tensor."""
    checkpoint = load_checkpoint(path)
    for name in tensor_shapes(checkpoint.config):
        checkpoint.source.get(name)


@pytest.mark.parametrize("kept", [0, 1, 4, 8, 23, 24, 31, 40, 200, 1000, 3000, 6000, 0.5, 0.9, -33, -1])
def test_truncated_gguf(kept, good_gguf, tmp_path):
    """A GGUF cut anywhere, header or data, is refused as truncated."""
    data = good_gguf.read_bytes()
    cut = int(len(data) * kept) if isinstance(kept, float) else kept
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:cut])
    assert "truncated" in refuses(path)


HUGE = (1 << 63) - 1


def _patched(data: bytes, offset: int, value: int, size: int = 8) -> bytes:
    return data[:offset] + value.to_bytes(size, "little") + data[offset + size :]


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (0, 4, "does not begin with 'GGUF'"),
        (4, 4, "version 4294967295 is not supported; allowed are 2 and 3"),
        (8, 8, "at most 65,536"),
        (16, 8, "at most 65,536"),
        (24, 8, "a metadata key is 9,223,372,036,854,775,807 bytes long"),
    ],
)
def test_hostile_gguf_counts(offset, size, message, good_gguf, tmp_path):
    """Counts and lengths far beyond the file are refused before anything is allocated for them."""
    path = tmp_path / "hostile.gguf"
    path.write_bytes(_patched(good_gguf.read_bytes(), offset, HUGE & ((1 << 8 * size) - 1), size))
    assert message in refuses(path)


def _after(data: bytes, text: bytes, skip_bytes: int = 0) -> int:
    return data.index(struct.pack("<Q", len(text)) + text) + 8 + len(text) + skip_bytes


@pytest.mark.parametrize("count", [HUGE, 1 << 40, (1 << 24) + 1, 1 << 20, 97])
def test_hostile_gguf_arrays(count, good_gguf, tmp_path):
    """An array that claims more items than there are is refused, whatever it claims."""
    data = good_gguf.read_bytes()
    for key in (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type"):
        path = tmp_path / "hostile.gguf"
        path.write_bytes(_patched(data, _after(data, key, 8), count))
        refuses(path)


@pytest.mark.parametrize(
    ("skip_bytes", "size", "value", "message"),
    [
        (0, 4, 0, "has 0 dimensions"),
        (0, 4, 1 << 31, "has 2147483648 dimensions"),
        (4, 8, HUGE, "cannot be of type|truncated"),
        (4, 8, 0, "cannot be of type"),
        (4, 8, 32, r"has shape \[96, 32\]"),
        (12, 8, HUGE, "truncated"),
        (20, 4, 999, "unknown type 999"),
        (20, 4, gguf.GGMLQuantizationType.Q4_K, "cannot be of type Q4_K"),
        (20, 4, gguf.GGMLQuantizationType.I32, "of type I32, which cannot be read as weights"),
        (24, 8, HUGE, "truncated"),
    ],
)
def test_hostile_gguf_tensors(skip_bytes, size, value, message, good_gguf, tmp_path):
    """A tensor description with an impossible rank, shape, type or offset is refused."""
    data = good_gguf.read_bytes()
    path = tmp_path / "hostile.gguf"
    path.write_bytes(_patched(data, _after(data, b"token_embd.weight", skip_bytes), int(value), size))
    assert re.search(message, refuses(path))


def test_a_big_claim_costs_nothing(tmp_path):
    """A 100-byte file claiming four million strings is refused at the first missing one."""
    key = b"tokenizer.ggml.tokens"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path = tmp_path / "claim.gguf"
    path.write_bytes(header + struct.pack("<IIQ", 9, 8, 1 << 22) + bytes(80))
    assert "truncated" in refuses(path)


def test_gguf_parts(tmp_path):
    """One part of a split GGUF says how to join the parts."""
    writer = gguf.GGUFWriter(tmp_path / "split.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "llama-gguf-split --merge" in refuses(tmp_path / "split.gguf")


@RELAXED
@given(data=st.data())
def test_any_cut_or_flip_of_a_gguf_header(good_gguf, tmp_path_factory, data):
    """However a header is cut or a byte of it changed: the file loads, or CheckpointError; nothing else."""
    whole = bytearray(good_gguf.read_bytes())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        header_bytes = min(tensor.offset_bytes for tensor in GgufFile(good_gguf).tensors.values())
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.gguf"
    path.write_bytes(bytes(whole))
    try:
        load_all(path)
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kept", [0, 7, 8, 9, 100, 1000, 0.5, -1])
def test_truncated_safetensors(kept, good_directory, tmp_path):
    """A safetensors file cut anywhere is refused, naming the file."""
    shutil.copytree(good_directory, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert "model.safetensors: corrupt or truncated" in refuses(tmp_path / "m")


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 60) + b"{}",
        _safetensors(b"{"),
        _safetensors([]),
        _safetensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, bytes(4)),
        _safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 62]}}),
        _safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        _safetensors({"a": {"dtype": "Q99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    ],
)
def test_hostile_safetensors(data, good_directory, tmp_path):
    """Headers that claim too much, lie about offsets or are no JSON are refused."""
    shutil.copytree(good_directory, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(data)
    assert "model.safetensors: corrupt or truncated" in refuses(tmp_path / "m")


def test_wrong_dtype(good_directory, tmp_path):
    """Integer weights are refused, naming the tensor and what is allowed."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(good_directory, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = np.zeros(64, dtype=np.int8)
    save_file(tensors, weights)
    assert "'model.norm.weight' is of type I8; allowed are F32, F16, BF16" in refuses(tmp_path / "m")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "allowed are .safetensors files beside it"),
        ({"weight_map": {"a": "model-1.safetensors"}}, "model-1.safetensors: missing"),
        ({"weight_map": {}}, "lists 0 files"),
        ({"weight_map": 3}, "Expected `object`, got `int`"),
        ({}, "missing required field `weight_map`"),
    ],
)
def test_bad_index(index, message, good_directory, tmp_path):
    """An index that points outside the directory, at nothing, or is malformed is refused."""
    shutil.copytree(good_directory, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refuses(tmp_path / "m")


@RELAXED
@given(data=st.data())
def test_any_cut_or_flip_of_a_safetensors_header(good_directory, tmp_path_factory, data):
    """However a safetensors header is cut or changed: it loads, or CheckpointError; nothing else."""
    directory = tmp_path_factory.mktemp("fuzz")
    whole = bytearray((good_directory / "model.safetensors").read_bytes())
    header_bytes = 8 + struct.unpack("<Q", whole[:8])[0]
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    shutil.copy(good_directory / "config.json", directory)
    (directory / "model.safetensors").write_bytes(bytes(whole))
    try:
        load_all(directory)
    except CheckpointError as error:
        assert "\n" not in str(error)
