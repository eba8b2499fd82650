"""The texts that ship with the exporter, written for it: one to calibrate on, another to measure on.

They are small on purpose: enough to see which inputs of a matrix matter and to notice a broken export, not
to judge a model. For that, give `--calibration` and `--eval`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer

from edge_reasoner.contract.bundle.tokenizer_files import tokenizer_faults
from edge_reasoner.errors import CheckpointError, InputError
from edge_reasoner.files import decode_text, is_unicode, parse_json, read_bytes

_SEPARATOR = "\n-----\n"
_MAX_TEXT_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class TextSet:
    """Documents and the SHA-256 of the file they came from."""

    name: str
    documents: tuple[str, ...]
    sha256: str


def shipped_text(package: str, file: str) -> TextSet:
    """A text of this package, documents separated by a line of five hyphens."""
    data = resources.files(package).joinpath(file).read_bytes()
    documents = tuple(data.decode("utf-8").strip().split(_SEPARATOR))
    return TextSet(f"{package}/{file}", documents, hashlib.sha256(data).hexdigest())


def calibration_text() -> TextSet:
    """What quantizers and the plan look at unless `--calibration` names something else."""
    return shipped_text("edge_export.data", "calibration.txt")


def probe_text() -> TextSet:
    """What the quality figures of a report are measured on unless `--eval` names something else."""
    return shipped_text("edge_export.data", "probe.txt")


def read_text_set(path: Path) -> TextSet:
    """Reads a user's text: `.txt` (documents separated by a line of five hyphens) or `.jsonl`.

    A JSONL row is a string, or an object whose text fields (`text`, or `question`/`query`/`prompt` followed
    by `answer`) are joined by a newline. Raises InputError naming file and line.
    """
    data = read_bytes(path, _MAX_TEXT_BYTES)
    text = decode_text(data, str(path)).replace("\r\n", "\n")
    documents = tuple(_jsonl(text, path) if path.suffix == ".jsonl" else text.strip().split(_SEPARATOR))
    if not any(document.strip() for document in documents):
        raise InputError(f"{path}: no text in it")
    return TextSet(str(path.name), documents, hashlib.sha256(data).hexdigest())


def to_token_batches(
    texts: TextSet, tokenizer: Tokenizer, prefix: Sequence[int], *, max_tokens: int, sequence_tokens: int
) -> tuple[torch.Tensor, ...]:
    """Token ids int64 [T], one tensor a document, each cut to `sequence_tokens`, together ≤ `max_tokens`.

    `prefix` (the BOS token, where the model wants one) starts each. Documents of one token are skipped.
    """
    batches: list[torch.Tensor] = []
    left = max_tokens
    for document in texts.documents:
        with tokenizer_faults(texts.name, CheckpointError):
            ids = [*prefix, *tokenizer.encode(document, add_special_tokens=False).ids]
        ids = ids[: min(sequence_tokens, left)]
        if len(ids) < 2:
            continue
        batches.append(torch.tensor(ids, dtype=torch.int64))
        left -= len(ids)
        if left < 2:
            break
    if not batches:
        raise InputError(f"{texts.name}: no document of two tokens or more")
    return tuple(batches)


def _jsonl(text: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):  # a row may hold other separators of lines
        if not line.strip():
            continue
        # joined files have a byte order mark in the middle, which it skips
        row = parse_json(line.strip(), f"{path}, line {number}", allow_nan=True)
        if not is_unicode(row):
            raise InputError(f"{path}, line {number}: a lone surrogate (half a character, as \\ud800) in it")
        if isinstance(row, str):
            yield row
            continue
        fields = ("text", "question", "query", "prompt", "answer")
        parts = (
            [row[name] for name in fields if isinstance(row.get(name), str)] if isinstance(row, dict) else []
        )
        if not parts:
            raise InputError(f"{path}, line {number}: needs one of the text fields {', '.join(fields)}")
        yield "\n".join(parts)
