"""GGUF files of other times and machines: each is read, or named for what it is."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from support.tiny_models import make_model, write_gguf

from edge_export.checkpoint.gguf_file import GgufFile, gguf_architecture
from edge_export.checkpoint.load import detect, find_model, load_checkpoint
from edge_reasoner.errors import CheckpointError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A tiny llama's file, with a name and tags."""
    extra = {"add_name": "Caf\u00e9", "add_tags": ["caf\u00e9", "b"], "add_chat_template": "caf\u00e9"}
    return write_gguf(make_model("llama"), tmp_path_factory.mktemp("gguf") / "good.gguf", extra=extra)


def edited(good, tmp_path, old, new, count=-1):
    data = good.read_bytes()
    assert old in data and len(old) == len(new)
    path = tmp_path / "m.gguf"
    path.write_bytes(data.replace(old, new, count))
    return path


def with_type(good, tmp_path, number):
    """The file with another type number for its final norm."""
    name = b"output_norm.weight"
    head = name + struct.pack("<IQ", 1, 64)
    return edited(good, tmp_path, head + struct.pack("<I", 0), head + struct.pack("<I", number))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (4, "the type Q4_2, which was removed from llama.cpp in 2023; quantize the model again"),
        (5, "Q4_3"),
        (31, "Q4_0_4_4, which was removed from llama.cpp in December 2024"),
        (33, "Q4_0_8_8"),
        (36, "IQ4_NL_4_4"),
        (99, "unknown type 99: the file is corrupt, or newer"),
    ],
)
def test_types_of_other_times(good, tmp_path, number, message):
    """A type that llama.cpp has removed is no corruption, and says what to do."""
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile(with_type(good, tmp_path, number))
    assert "'output_norm.weight'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [24, 26, 15])
def test_types_that_are_no_weights(good, tmp_path, number):
    """Integers and ggml's inner types are refused by name."""
    with pytest.raises(CheckpointError, match="output_norm"):
        load_checkpoint(with_type(good, tmp_path, number))


def test_text_that_nobody_needs(good, tmp_path):
    """A name and tags in Latin-1 are as good as none; the chat template has to be text."""
    path = edited(good, tmp_path, "é".encode(), b"e\xe9")
    checkpoint = load_checkpoint(path)
    assert checkpoint.name == "m" and GgufFile(path).metadata["general.tags"][1] == "b"
    assert checkpoint.chat_template is None


def test_a_big_endian_file_is_named(tmp_path):
    """Not "version 50331648"."""
    writer = gguf.GGUFWriter(tmp_path / "be.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.ones(4, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(CheckpointError, match="a big-endian GGUF file; allowed are little-endian ones"):
        detect(tmp_path / "be.gguf")


@pytest.mark.parametrize("magic", [b"tjgg", b"lmgg"])
def test_predecessors_are_named(tmp_path, magic):
    """GGML and GGJT files are older, not corrupt."""
    (tmp_path / "old.gguf").write_bytes(magic + bytes(60))
    with pytest.raises(CheckpointError, match="an older format than GGUF"):
        detect(tmp_path / "old.gguf")


def test_parts_are_named(tmp_path):
    """One part of a split file, first or later, and a folder of parts, say how to join them."""
    for number in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05}-of-00002.gguf", "llama")
        writer.add_uint16("split.count", 2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(CheckpointError, match="one of 2 GGUF parts; join them"):
            load_checkpoint(tmp_path / f"m-{number:05}-of-00002.gguf")
    with pytest.raises(CheckpointError, match="a GGUF file in parts"):
        find_model(tmp_path)


def test_the_architecture_alone(good):
    """It is found without reading the rest."""
    assert gguf_architecture(good) == "llama"
