"""Builds a `tokenizers` tokenizer from the metadata of a GGUF file.

Two kinds are read: `tokenizer.ggml.model` = `gpt2` (byte-level BPE with an explicit merge list: SmolLM2,
Llama 3, Qwen, Mistral Nemo) and `llama` (SentencePiece BPE with scores: Llama 2, Mistral 7B, Gemma). It
encodes text as llama.cpp does with `parse_special = true`: special and user-defined tokens are cut out of the
raw text first, longest match, and every piece between them is tokenized on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge_export.checkpoint.added_tokens import check_added_tokens, own_tokens
from edge_export.checkpoint.gguf_file import GgufFile, MetadataValue
from edge_export.checkpoint.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from edge_export.checkpoint.tokenizer_files import (
    END_OF_GENERATION,
    MAX_TOKEN_BYTES,
    MAX_VOCAB_TOKENS,
    UNSET_ID,
    TokenizerFiles,
    canonical_json,
    check_chat_template,
    dump_json,
    ordered_ids,
    parse_tokenizer,
)
from edge_reasoner.contract.bundle.tokenizer_files import tokenizer_faults
from edge_reasoner.errors import CheckpointError

# llama_token_type of GGUF (and SentencePiece's piece types)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

#: fill-in-the-middle markers; llama.cpp takes them for control tokens whatever their type says …
_FIM_MARKERS: Final = frozenset(
    {
        *(
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
        ),
        *(
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
        ),
        *(
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
        ),
    }
)
#: … and these of them end the generation too
_FIM_ENDS: Final = frozenset(
    {
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    }
)
_END_KEYS: Final = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids with their types (and scores where the model has them)."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    ids: dict[str, int]

    def text(self, token_id: int | None) -> str | None:
        """The token's text; None for none."""
        return None if token_id is None else self.tokens[token_id]


def tokenizer_from_gguf(path: Path) -> TokenizerFiles:
    """The tokenizer and chat template inside the GGUF file at `path`.

    Raises CheckpointError with one line when the file is corrupt or its tokenizer is of an unsupported kind.
    """
    return build_tokenizer(GgufFile(path).metadata, str(path))


def build_tokenizer(metadata: Mapping[str, MetadataValue], where: str) -> TokenizerFiles:
    """The tokenizer that `metadata` (GGUF keys) describes; `where` names the file in errors."""
    reader = _Reader(metadata, where)
    kind = reader.text("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(reader)
    if kind == "llama":
        return _sentencepiece(reader)
    if kind is None:
        raise CheckpointError(f"{where}: has no tokenizer (no tokenizer.ggml.model)")
    raise CheckpointError(
        f"{where}: tokenizer.ggml.model {kind!r} is not supported; allowed: 'gpt2', 'llama'"
    )


class _Reader:
    """Typed access to metadata: a missing key is None, a wrong type is an error that names it."""

    def __init__(self, metadata: Mapping[str, MetadataValue], where: str) -> None:
        self._metadata = metadata
        self.where = where

    def _get(self, key: str, kind: type, wanted: str) -> Any:
        value = self._metadata.get(key)
        if kind is str and isinstance(value, bytes):
            raise CheckpointError(f"{self.where}: {key} is not UTF-8 text")
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise CheckpointError(f"{self.where}: {key} must be {wanted}, not {type(value).__name__}")
        return value

    def text(self, key: str) -> str | None:
        value: str | None = self._get(key, str, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value: bool | None = self._get(key, bool, "true or false")
        return default if value is None else value

    def strings(self, key: str) -> list[str]:
        value: list[str] | None = self._get(key, list, "an array of strings")
        if not value:
            raise CheckpointError(f"{self.where}: {key} is missing or empty")
        for number, item in enumerate(value):
            if not isinstance(item, str):
                raise CheckpointError(f"{self.where}: item {number} of {key} is not UTF-8 text")
        return value

    def numbers(self, key: str, length: int) -> list[Any] | None:
        value = self._get(key, np.ndarray, "an array of numbers")
        if value is None:
            return None
        if len(value) != length:
            raise CheckpointError(
                f"{self.where}: {key} has {len(value)} entries for {length} tokens; the numbers must agree"
            )
        if not np.all(np.isfinite(value)):
            raise CheckpointError(f"{self.where}: {key} has entries that are not finite")
        listed: list[Any] = value.tolist()
        return listed

    def token_id(self, name: str, vocab_size: int, default: int | None = None) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value: int | None = self._get(key, int, "a token id")
        if value is None or value == UNSET_ID:
            return default if default is not None and default < vocab_size else None
        if not 0 <= value < vocab_size:
            raise CheckpointError(f"{self.where}: {key} is {value}; token ids are 0 … {vocab_size - 1}")
        return value

    def idle_id(self, name: str, vocab_size: int) -> int | None:
        """A token that nothing depends on (padding): files in the wild point it past the vocabulary."""
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < vocab_size else None

    def vocabulary(self, *, scored: bool = False) -> Vocabulary:
        """Tokens and types; scores, which only a `scored` model needs."""
        tokens = self.strings("tokenizer.ggml.tokens")
        if len(tokens) > MAX_VOCAB_TOKENS:
            raise CheckpointError(
                f"{self.where}: {len(tokens)} tokens; at most {MAX_VOCAB_TOKENS} are allowed"
            )
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        ids: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if ids.setdefault(token, i) != i:
                raise CheckpointError(f"{self.where}: token {token[:80]!r} has two ids, {ids[token]} and {i}")
            if len(token.encode("utf-8")) > MAX_TOKEN_BYTES:
                raise CheckpointError(f"{self.where}: token {i} is longer than {MAX_TOKEN_BYTES} bytes")
        types = self.numbers("tokenizer.ggml.token_type", len(tokens)) or [NORMAL] * len(tokens)
        scores = self.numbers("tokenizer.ggml.scores", len(tokens)) if scored else None
        return Vocabulary(
            tuple(tokens), tuple(int(t) for t in types), None if scores is None else tuple(scores), ids
        )


def _byte_level(reader: _Reader) -> TokenizerFiles:
    """`gpt2`: byte-level BPE with a merge list."""
    vocabulary = reader.vocabulary()
    pre, warnings = _pre_tokenizer(reader)
    merges = []
    for merge in reader.strings("tokenizer.ggml.merges"):
        split = merge.find(" ", 1)
        left, right = merge[:split], merge[split + 1 :]
        if split < 0 or any(part not in vocabulary.ids for part in (left, right, left + right)):
            raise CheckpointError(
                f"{reader.where}: merge {merge[:80]!r} does not join two tokens into a third"
            )
        merges.append((left, right))
    model = _bpe(vocabulary, merges, ignore_merges=pre.ignore_merges)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    parts = {"normalizer": None, "pre_tokenizer": pre.to_json(), "decoder": byte_level, "model": model}
    return _finish(
        reader, vocabulary, parts, add_bos=pre.add_bos, defaults=(None, None, None), warnings=warnings
    )


def _pre_tokenizer(reader: _Reader) -> tuple[PreTokenizer, tuple[str, ...]]:
    """The splitting rule, and a warning when the file does not name one (llama.cpp's fallback is taken)."""
    name = reader.text("tokenizer.ggml.pre")
    if not name:
        warning = f"{reader.where}: names no pre-tokenizer (tokenizer.ggml.pre); the generic one is used"
        return PRE_TOKENIZERS["default"], (warning,)
    if name not in PRE_TOKENIZERS:
        allowed = ", ".join(sorted(PRE_TOKENIZERS))
        raise CheckpointError(f"{reader.where}: pre-tokenizer {name!r} is not supported; allowed: {allowed}")
    return PRE_TOKENIZERS[name], ()


def _sentencepiece(reader: _Reader) -> TokenizerFiles:
    """`llama`: SentencePiece BPE; a pair merges when its text is a token, best score first."""
    vocabulary = reader.vocabulary(scored=True)
    if vocabulary.scores is None:
        raise CheckpointError(
            f"{reader.where}: tokenizer.ggml.scores is missing; a 'llama' tokenizer needs them"
        )
    return sentencepiece_tokenizer(reader, vocabulary, reader.flag("tokenizer.ggml.add_space_prefix", True))


def sentencepiece_tokenizer(
    reader: _Reader, vocabulary: Vocabulary, add_space_prefix: bool
) -> TokenizerFiles:
    """The SentencePiece BPE tokenizer of `vocabulary`; ▁ stands for a space."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = [{"type": "Prepend", "prepend": "▁"}] if add_space_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if add_space_prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    declared_unknown = next((i for i, kind in enumerate(vocabulary.types) if kind == UNKNOWN), None)
    unknown = reader.token_id("unknown", len(vocabulary.tokens), declared_unknown)
    model = _bpe(
        vocabulary,
        merges_from_scores(vocabulary),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
    )
    parts = {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    return _finish(reader, vocabulary, parts, add_bos=True, defaults=(1, 2, unknown), warnings=())


def merges_from_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merge list that makes BPE merge as SentencePiece does.

    SentencePiece joins two neighbours whenever their concatenation is a token, best score first. As merges:
    every way to cut a token into two tokens, ordered by the score of the whole (ties: by id, as SentencePiece
    numbers them). Byte tokens such as `<0x0A>` stand for bytes, never for their own text, and take no part.
    """
    excluded = (UNKNOWN, CONTROL, BYTE)
    usable = {
        token: i
        for token, i in vocabulary.ids.items()
        if vocabulary.types[i] not in excluded and len(token) > 0
    }
    scores = vocabulary.scores or (0.0,) * len(vocabulary.tokens)
    whole = sorted(
        (token for token in usable if len(token) > 1),
        key=lambda token: (-scores[usable[token]], usable[token]),
    )
    merges = []
    for token in whole:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [cut for cut in cuts if cut[0] in usable and cut[1] in usable]
        merges.extend(sorted(pairs, key=lambda pair: (usable[pair[0]], usable[pair[1]])))
    return merges


def _bpe(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], **options: Any) -> dict[str, Any]:
    """The `model` object of a tokenizer.json."""
    settings = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {"type": "BPE", **settings, **options, "vocab": vocabulary.ids, "merges": merges}


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are cut out of the raw text: control, unknown, user-defined, and well-known markers."""
    always = END_OF_GENERATION | _FIM_MARKERS | _FIM_ENDS
    added = []
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        special = kind in (CONTROL, UNKNOWN) or token in always
        if special or kind == USER_DEFINED:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            added.append({"id": i, "content": token, **flags, "special": special})
    return added


def _end_ids(reader: _Reader, vocabulary: Vocabulary, eos: int | None) -> tuple[int, ...]:
    """Ids that stop a generation: the declared ones, and the well-known names."""
    size = len(vocabulary.tokens)
    declared = [reader.token_id(name, size) for name in _END_KEYS]
    named = [vocabulary.ids[token] for token in END_OF_GENERATION | _FIM_ENDS if token in vocabulary.ids]
    return ordered_ids(eos, [*(i for i in declared if i is not None), *named])


def _finish(
    reader: _Reader,
    vocabulary: Vocabulary,
    parts: dict[str, Any],
    *,
    add_bos: bool,
    defaults: tuple[int | None, int | None, int | None],
    warnings: tuple[str, ...],
) -> TokenizerFiles:
    """Assembles and validates the tokenizer; `defaults` are the family's bos, eos and unknown ids."""
    size = len(vocabulary.tokens)
    bos = reader.token_id("bos", size, defaults[0])
    eos = reader.token_id("eos", size, defaults[1])
    unknown = reader.idle_id("unknown", size)
    unknown = defaults[2] if unknown is None else unknown
    padding = reader.idle_id("padding", size)
    add_bos = reader.flag("tokenizer.ggml.add_bos_token", add_bos)
    if add_bos and bos is None:
        raise CheckpointError(f"{reader.where}: add_bos_token is true, but bos_token_id is not set")
    added = _added_tokens(vocabulary)
    head = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": None,
    }
    tokenizer = parse_tokenizer(dump_json({**head, **parts}), reader.where)
    with tokenizer_faults(reader.where, CheckpointError):
        warnings = (*warnings, *check_added_tokens(tokenizer, own_tokens(head), reader.where))
    template = reader.text("tokenizer.chat_template")
    if template is not None and not template.strip():
        template = None
    return TokenizerFiles(
        tokenizer_json=canonical_json(tokenizer, reader.where),
        chat_template=None if template is None else check_chat_template(template, reader.where),
        bos_token_id=bos,
        eos_token_ids=_end_ids(reader, vocabulary, eos),
        add_bos=add_bos,
        bos_token=vocabulary.text(bos),
        eos_token=vocabulary.text(eos),
        unk_token=vocabulary.text(unknown),
        pad_token=vocabulary.text(padding),
        special_tokens=tuple(token["content"] for token in added if token["special"]),
        vocab_size=size,
        warnings=warnings,
    )
