"""Reads a SentencePiece `tokenizer.model` (a small protobuf) without the sentencepiece library.

Of `ModelProto` only what a BPE tokenizer needs: field 1, the pieces (text, score, type); field 2, the trainer
settings (kind of model, special ids); field 3, the normalizer (dummy prefix, character map). Unknown fields
are skipped, as protobuf prescribes. The result is built exactly like a GGUF's `llama` tokenizer: the text
after a special or user-defined token gets the dummy prefix again (SentencePiece adds it once, at the start).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge_export.checkpoint.gguf_tokenizer import NORMAL, USER_DEFINED, build_tokenizer
from edge_export.checkpoint.json_file import read_bounded
from edge_export.checkpoint.tokenizer_files import MAX_VOCAB_TOKENS, TokenizerFiles
from edge_reasoner.contract.bundle.protobuf import fields
from edge_reasoner.errors import CheckpointError

MAX_MODEL_BYTES: Final = 64 * 1024 * 1024
_BPE: Final = 2


def tokenizer_from_sentencepiece(path: Path) -> TokenizerFiles:
    """The tokenizer in the SentencePiece BPE model at `path`, without the tokens that lie beside it.

    Raises CheckpointError when it is corrupt, of another kind (unigram, word, char), or normalizes its input.
    """
    where = str(path)
    try:
        model = _parse(read_bounded(path, MAX_MODEL_BYTES), where)
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{where}: not a SentencePiece model: {error}") from error
    if model.kind != _BPE:
        raise CheckpointError(f"{where}: only SentencePiece BPE is supported; this is kind {model.kind}")
    if model.has_character_map:
        raise CheckpointError(f"{where}: SentencePiece models that normalize text are not supported")
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in model.pieces],
        "tokenizer.ggml.scores": np.array([piece.score for piece in model.pieces], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([piece.kind for piece in model.pieces], dtype=np.int32),
        "tokenizer.ggml.add_space_prefix": model.dummy_prefix,
    }
    special_ids = {"unknown": model.unknown_id, "bos": model.bos_id, "eos": model.eos_id}
    metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in special_ids.items() if i >= 0}
    metadata["tokenizer.ggml.add_bos_token"] = model.bos_id >= 0
    return build_tokenizer(metadata, where)


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class _Model:
    pieces: tuple[_Piece, ...]
    kind: int
    unknown_id: int
    bos_id: int
    eos_id: int
    dummy_prefix: bool
    has_character_map: bool


def _parse(data: bytes, where: str) -> _Model:
    pieces: list[_Piece] = []
    trainer: dict[int, int | memoryview] = {}
    normalizer: dict[int, int | memoryview] = {}
    for number, value in fields(memoryview(data)):
        if number == 1 and isinstance(value, memoryview):
            pieces.append(_piece(value))
            if len(pieces) > MAX_VOCAB_TOKENS:
                raise CheckpointError(f"{where}: more than {MAX_VOCAB_TOKENS} tokens")
        elif number == 2 and isinstance(value, memoryview):
            trainer = dict(fields(value))
        elif number == 3 and isinstance(value, memoryview):
            normalizer = dict(fields(value))
    return _Model(
        pieces=tuple(pieces),
        kind=_integer(trainer, 3, 1),
        unknown_id=_integer(trainer, 40, 0),
        bos_id=_integer(trainer, 41, 1),
        eos_id=_integer(trainer, 42, 2),
        dummy_prefix=bool(_integer(normalizer, 3, 1)),
        has_character_map=bool(normalizer.get(2)),
    )


def _piece(data: memoryview) -> _Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in fields(data):
        if number == 1 and isinstance(value, memoryview):
            text = str(value, "utf-8")
        elif number == 2 and isinstance(value, memoryview):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if kind == USER_DEFINED:  # matched in the raw text, where a space is still a space
        text = text.replace("▁", " ")
    return _Piece(text, score, kind)


def _integer(fields: dict[int, int | memoryview], number: int, default: int) -> int:
    """A signed 32-bit integer field (a varint of 64 bits, two's complement)."""
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} is not a number")
    return value - (1 << 64) if value >= 1 << 63 else value
