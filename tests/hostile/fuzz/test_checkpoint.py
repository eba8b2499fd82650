"""Fuzzers of weights: GGUF and safetensors files, as a checkpoint's loader meets them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.fuzz.mutate import FEW, MANY, check
from support.tiny_checkpoints import write_checkpoint
from support.tiny_models import make_model, write_gguf

from edge_export.checkpoint.load import DecoderCheckpoint, detect, load_checkpoint

WORDS = (
    b"llama",
    b"qwen2",
    b"general.architecture",
    b"BF16",
    b"F8_E4M3",
    b"I64",
    b'"data_offsets"',
    b"[0,0]",
)


def _read(checkpoint: DecoderCheckpoint) -> None:
    """Every weight and the tokenizer."""
    for name in checkpoint.source.names():
        assert tuple(checkpoint.source.get(name).shape) == checkpoint.source.shape(name)
    assert checkpoint.tokenizer.vocab_size <= checkpoint.config.vocab_size


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    """Small whole files of both formats, and the directory that the safetensors file belongs to."""
    folder = tmp_path_factory.mktemp("seeds")
    write_checkpoint(folder / "hf", num_hidden_layers=1, hidden_size=16, intermediate_size=16, head_dim=4)
    tokens = [f"t{i}" for i in range(96)]
    extra = {
        "add_tokenizer_pre": "gpt-2",
        "add_token_list": tokens,
        "add_token_types": [1] * 95 + [3],
        "add_token_merges": ["t 1"],
        "add_chat_template": "{{ messages }}",
    }
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    gguf = write_gguf(make_model("qwen2", **small), folder / "m.gguf", extra=extra).read_bytes()
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return {
        "gguf": [gguf],
        "safetensors": [(folder / "hf" / "model.safetensors").read_bytes()],
        "config": [(folder / "hf" / "config.json").read_bytes()],
        "directory": [(folder / "hf" / name).read_bytes() for name in (*names, "model.safetensors")],
    }


def fuzz_gguf(data: bytes) -> None:
    """Detects, loads and reads a GGUF file of these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(data)
        detect(path)
        checkpoint = load_checkpoint(path)
        for name in checkpoint.source.names():
            checkpoint.source.get(name)


def _fuzz_file(directory: list[bytes], changed: str) -> Callable[[bytes], None]:
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")

    def target(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in zip(names, directory, strict=True):
                (Path(folder) / name).write_bytes(data if name == changed else content)
            detect(Path(folder))
            _read(load_checkpoint(Path(folder)))

    return target


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_fuzz_gguf(corpora: dict[str, list[bytes]], count: int) -> None:
    """Only CheckpointErrors leave the loader of GGUF files."""
    check(fuzz_gguf, corpora["gguf"], count, words=WORDS)


@pytest.mark.parametrize("count", [FEW // 2, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("corpus", "changed"), [("safetensors", "model.safetensors"), ("config", "config.json")]
)
def test_fuzz_directory(corpora: dict[str, list[bytes]], corpus: str, changed: str, count: int) -> None:
    """Only CheckpointErrors leave the loader of directories, whichever file is damaged."""
    check(_fuzz_file(corpora["directory"], changed), corpora[corpus], count, words=WORDS)
