"""A tokenizer.json from a stranger, made over into one that the `tokenizers` library may get.

The library trusts its file: a chain of `Replace` steps multiplies a text until memory ends, an expression
runs for ever, an odd length panics. So the file is parsed here, strictly and by an allow-list of components
with bounds, and what the library gets is written anew from what was parsed; only vocabulary and merges are
passed on as they are. Truncation and padding are left out: the product has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from edge_reasoner.contract.bundle import tokenizer_parts as parts
from edge_reasoner.contract.bundle.tokenizer_files import MAX_TOKENIZER_BYTES
from edge_reasoner.contract.bundle.tokenizer_parts import MAX_TOKEN_CHARS, MAX_VOCAB_TOKENS
from edge_reasoner.contract.bundle.tokenizer_patterns import is_accepted
from edge_reasoner.errors import InputError, one_line

#: Gemma 3 has 6,414
MAX_ADDED_TOKENS: Final = 20_000
MAX_ADDED_CHARS: Final = 1 << 20
#: components in one sequence, those of inner ones counted
MAX_STEPS: Final = 32
#: times that the normalizers together may lengthen a text
MAX_GROWTH: Final = 128.0
#: in SentencePiece's own character maps a character becomes 33 bytes at most
_MAX_MAPPED_BYTES: Final = 64
_MAX_SCORE: Final = 1e9

#: how much longer a text may become, in bytes
_GROWTH: Final[dict[type, float]] = {
    parts.BertNormalizer: 4.0,
    parts.Nfc: 3.0,
    parts.Nfd: 4.0,
    parts.Nfkc: 12.0,
    parts.Nfkd: 12.0,
    parts.Lowercase: 1.5,
    parts.ByteLevelNormalizer: 2.0,
}


@dataclass(frozen=True)
class CheckedTokenizer:
    """What the library is given, and what its work is bounded by.

    `growth`: times that a text becomes longer, in bytes. `effort`: steps per character, where a model tries
    many pieces at each. `token_chars`: what a token may come to as text, at most.
    """

    json: bytes
    growth: float
    effort: float
    token_chars: int


def check_tokenizer(data: bytes, where: str, kind: type[InputError]) -> CheckedTokenizer:
    """Parses a tokenizer.json and writes it anew. Raises `kind` with one line for what is not allowed."""
    try:
        file = _parsed(data)
        growth = _normalizer_growth(file.normalizer)
        decoded = _decoder_growth(file.decoder)
        _check_pre_tokenizer(file.pre_tokenizer)
        _check_post_processor(file.post_processor)
        _check_added(file.added_tokens)
        longest = _longest_token(file.model)
        if longest > MAX_TOKEN_CHARS:
            raise ValueError(f"a token of {longest} characters; at most {MAX_TOKEN_CHARS} are allowed")
        effort, model = _effort(file.model, longest), file.model
        if isinstance(model, parts.Bpe):  # merges left out at random are for training alone
            model = msgspec.structs.replace(model, dropout=None)
        written = parts.Written(
            version=file.version,
            truncation=None,
            padding=None,
            added_tokens=file.added_tokens,
            normalizer=file.normalizer,
            pre_tokenizer=file.pre_tokenizer,
            post_processor=file.post_processor,
            decoder=file.decoder,
            model=model,
        )
        rewritten = msgspec.json.encode(written)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise kind(f"{where}: not a usable tokenizer: {one_line(error)}") from error
    longest = max([longest, *(len(token.content) for token in file.added_tokens)])
    return CheckedTokenizer(rewritten, growth, effort, math.ceil(longest * decoded))


def with_model_type(data: bytes) -> bytes:
    """The tokenizer.json with the type of its model, which files of 2020 leave out.

    What is no such file is returned as it is.
    """
    try:
        fields = msgspec.json.decode(data, type=parts.OldFile).model
        if "type" in fields:
            return data
        rest = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return data
    if "merges" in fields:
        kind = "BPE"
    elif "max_input_chars_per_word" in fields:
        kind = "WordPiece"
    else:
        kind = "Unigram" if "unk_id" in fields else "WordLevel"
    model = {"type": msgspec.Raw(msgspec.json.encode(kind)), **fields}
    return msgspec.json.encode({**rest, "model": model})


def _parsed(data: bytes) -> parts.File:
    if len(data) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{len(data)} bytes; at most {MAX_TOKENIZER_BYTES} are allowed")
    return msgspec.json.decode(data, type=parts.File)


def _longest_token(model: parts.Model) -> int:
    """Characters of the longest token; escaped ones count as they are written."""
    if isinstance(model, parts.Unigram):
        return max((len(token) for token, _ in model.vocab), default=0)
    # Between quotation marks is a token, or what separates two: quick, for it is read on every start.
    plain = bytes(model.vocab).replace(b"\\\\", b"__").replace(b'\\"', b"__")
    return max(map(len, plain.split(b'"')))


def _effort(model: parts.Model, longest: int) -> float:
    """Steps that the model takes for a character."""
    if isinstance(model, parts.Unigram):
        _check_unigram(model)
        return float(max(1, longest)) ** 2  # at each character, tokens of every length are tried and copied
    if isinstance(model, parts.WordPiece):  # every piece of a word is tried, from the longest on
        return float(max(1, model.max_input_chars_per_word))
    return 1.0


def _check_unigram(model: parts.Unigram) -> None:
    count = len(model.vocab)
    if count > MAX_VOCAB_TOKENS:
        raise ValueError(f"{count} tokens; at most {MAX_VOCAB_TOKENS} are allowed")
    if not all(abs(score) <= _MAX_SCORE for _, score in model.vocab):
        raise ValueError(f"a score of a token outside of ±{_MAX_SCORE:g}")
    if not all(token for token, _ in model.vocab):
        raise ValueError("an empty token")
    if model.unk_id is not None and not 0 <= model.unk_id < count:
        raise ValueError(f"unk_id {model.unk_id} is none of the {count} tokens")


def _check_added(tokens: Sequence[parts.AddedToken]) -> None:
    chars = sum(len(token.content) for token in tokens)
    if len(tokens) > MAX_ADDED_TOKENS or chars > MAX_ADDED_CHARS:
        raise ValueError(
            f"{len(tokens)} added tokens of {chars} characters; at most {MAX_ADDED_TOKENS} of "
            f"{MAX_ADDED_CHARS} are allowed"
        )


def _normalizer_growth(normalizer: parts.Normalizer | None) -> float:
    """Times that a text becomes longer by all the steps."""
    growth = 1.0
    for step in _flat(normalizer, parts.NormalizerSequence, "normalizers"):
        if isinstance(step, parts.Replace):
            growth *= _replace_growth(step)
        elif isinstance(step, parts.Precompiled):
            growth *= _mapped_growth(step)
        else:
            growth *= _GROWTH.get(type(step), 1.0)
    if growth > MAX_GROWTH:
        raise ValueError(
            f"normalizers that make a text {growth:.3g} times as long; at most {MAX_GROWTH:g} is allowed"
        )
    return growth


def _decoder_growth(decoder: parts.Decoder | None) -> float:
    growth = 1.0
    for step in _flat(decoder, parts.DecoderSequence, "decoders"):
        if isinstance(step, parts.Replace):
            growth *= _replace_growth(step)
    if growth > MAX_GROWTH:
        raise ValueError(
            f"decoders that make a text {growth:.3g} times as long; at most {MAX_GROWTH:g} is allowed"
        )
    return growth


def _replace_growth(step: parts.Replace) -> float:
    """Times that the replacement is longer than what it takes the place of."""
    put_bytes = len(step.content.encode())
    return max(1.0, put_bytes / _least_bytes(step.pattern))


def _mapped_growth(step: parts.Precompiled) -> float:
    """How a SentencePiece character map (length of a trie, the trie, texts with NULs) lengthens a text."""
    data = step.precompiled_charsmap
    trie_bytes = int.from_bytes(data[:4], "little")
    if len(data) < 4 or trie_bytes % 4 or 4 + trie_bytes > len(data):
        raise ValueError("a broken character map (precompiled_charsmap)")
    longest = max(map(len, data[4 + trie_bytes :].split(b"\0")))
    if longest > _MAX_MAPPED_BYTES:
        raise ValueError(f"a character map that makes {longest} bytes of a character")
    return max(1.0, float(longest) / 3)


def _least_bytes(pattern: parts.Pattern) -> int:
    """Bytes that the pattern takes of a text at least. Raises ValueError for one that is not allowed."""
    text, expression = pattern.String, pattern.Regex
    if isinstance(text, str) and not isinstance(expression, str):
        if not text:
            raise ValueError("a pattern that is empty")
        return len(text.encode())
    if not isinstance(expression, str) or isinstance(text, str):
        raise ValueError("a pattern must be either a String or a Regex")
    if not is_accepted(expression):
        raise ValueError(
            f"the expression {expression[:120]!r} is neither one of a known family nor plainly of linear time"
        )
    return 1


def _check_pre_tokenizer(pre_tokenizer: parts.PreTokenizer | None) -> None:
    for step in _flat(pre_tokenizer, parts.PreTokenizerSequence, "pretokenizers"):
        if isinstance(step, parts.Split):
            _least_bytes(step.pattern)


def _check_post_processor(processor: parts.PostProcessor | None) -> None:
    for step in _flat(processor, parts.ProcessorSequence, "processors"):
        if isinstance(step, parts.TemplateProcessing):
            _check_template(step.single, step.special_tokens, "A")
            _check_template(step.pair, step.special_tokens, "AB")


def _check_template(
    pieces: Sequence[parts.TemplatePiece], special: dict[str, parts.TemplateSpecial], allowed: str
) -> None:
    texts: list[str] = []
    for piece in pieces:
        place, text = piece.SpecialToken, piece.Sequence
        if isinstance(place, msgspec.UnsetType) == isinstance(text, msgspec.UnsetType):
            raise ValueError("a part of a template must be either a SpecialToken or a Sequence")
        if not isinstance(place, msgspec.UnsetType) and place.id not in special:
            raise ValueError(f"a template names the unknown token {place.id[:80]!r}")
        if not isinstance(text, msgspec.UnsetType):
            texts.append(text.id)
    if len(set(texts)) != len(texts) or not set(texts) <= set(allowed):
        raise ValueError("a template of special tokens that repeats the text")
    for name, token in special.items():
        if len(token.ids) != len(token.tokens) or token.id != name:
            raise ValueError(f"the special token {name[:80]!r} of a template is malformed")


def _flat(step: object, sequence: type, field: str) -> Iterable[object]:
    """The steps of sequences within each other, in order. Raises ValueError when they are too many."""
    flat: list[object] = []
    pending = [] if step is None else [step]
    count = 0
    while pending:
        count += 1
        if count > MAX_STEPS:
            raise ValueError(f"more than {MAX_STEPS} {field}")
        step = pending.pop(0)
        if isinstance(step, sequence):
            pending[:0] = list(getattr(step, field))
        else:
            flat.append(step)
    return flat
