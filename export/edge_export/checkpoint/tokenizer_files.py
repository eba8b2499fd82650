"""What every tokenizer loader returns, and the checks they share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Tokenizer

from edge_reasoner.contract.bundle.tokenizer_check import check_tokenizer, with_model_type
from edge_reasoner.contract.bundle.tokenizer_files import tokenizer_faults
from edge_reasoner.errors import CheckpointError

#: Gemma 3's tokenizer.json, the largest of the supported families, has 33 MB.
MAX_TOKENIZER_JSON_BYTES: Final = 96 * 1024 * 1024
#: as the device's template engine allows
MAX_CHAT_TEMPLATE_BYTES: Final = 256 * 1024
MAX_VOCAB_TOKENS: Final = 1 << 21
MAX_TOKEN_BYTES: Final = 4096
#: −1 as an unsigned number: what some converters write for "none"
UNSET_ID: Final = 0xFFFFFFFF
_OWN_JSON: Final = "tokenizer.json"

#: words, digits, spaces, another script, what no vocabulary has: whatever a tokenizer does, it does here
_TRIAL: Final = " Hello, world! 123\n\t don't  größe 你好 🙂 \U000fabcd"

#: Tokens that end an answer or a turn wherever a vocabulary has them; llama.cpp goes by the same names.
END_OF_GENERATION: Final = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    }
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as the bundle carries it.

    `tokenizer_json` loads with `tokenizers.Tokenizer.from_str`; it is canonical (same input, same
    bytes) and has neither truncation nor padding. For a decoder, encode with `add_special_tokens=False` and
    prepend `bos_token_id` when `add_bos`; an encoder needs the special tokens that its post-processor adds.
    """

    tokenizer_json: bytes
    chat_template: str | None
    bos_token_id: int | None
    #: the first is the checkpoint's own end-of-text token; generation stops at any of them
    eos_token_ids: tuple[int, ...]
    add_bos: bool
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    #: every special token's text, in the order of the ids; chat markup among them encodes to one id
    special_tokens: tuple[str, ...]
    #: largest token id + 1; the embedding may have more rows (padding), or fewer: see `limit_vocabulary`
    vocab_size: int
    warnings: tuple[str, ...] = ()


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """The tokenizer described by JSON `text`, without truncation and padding, and tried once.

    Raises CheckpointError when the device would not take it, the library refuses it, or it fails on the trial
    text.
    """
    with tokenizer_faults(where, CheckpointError):
        checked = check_tokenizer(with_model_type(text.encode("utf-8")), where, CheckpointError)
        tokenizer = Tokenizer.from_buffer(checked.json)
        tokenizer.decode(tokenizer.encode(_TRIAL).ids)
    return tokenizer


def open_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """The tokenizer of a `TokenizerFiles.tokenizer_json`. Raises CheckpointError when it is refused."""
    with tokenizer_faults(_OWN_JSON, CheckpointError):
        return Tokenizer.from_str(tokenizer_json.decode("utf-8"))


def encode_texts(tokenizer_json: bytes, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text with special tokens; a long text loses its end, not its closing token.

    Raises CheckpointError when the tokenizer fails on a text.
    """
    with tokenizer_faults(_OWN_JSON, CheckpointError):
        tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        tokenizer.enable_truncation(max_tokens)
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def canonical_json(tokenizer: Tokenizer, where: str) -> bytes:
    """The tokenizer's deterministic JSON. Raises CheckpointError when the device would not open it."""
    data = str(tokenizer.to_str(pretty=False)).encode("utf-8")
    if len(data) > MAX_TOKENIZER_JSON_BYTES:
        raise CheckpointError(
            f"{where}: the tokenizer has {len(data)} bytes; at most {MAX_TOKENIZER_JSON_BYTES} are allowed"
        )
    checked = check_tokenizer(data, where, CheckpointError)
    with tokenizer_faults(where, CheckpointError):
        again = Tokenizer.from_buffer(checked.json)
    if again.get_vocab_size() != tokenizer.get_vocab_size():
        raise CheckpointError(f"{where}: the token ids have gaps; the library cannot write such a vocabulary")
    return data


def check_chat_template(template: str, where: str) -> str:
    """The template itself. Raises CheckpointError when it is too large to be one, or no text."""
    try:
        size_bytes = len(template.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: the chat template is not valid Unicode text") from error
    if size_bytes > MAX_CHAT_TEMPLATE_BYTES:
        raise CheckpointError(
            f"{where}: the chat template has {size_bytes} bytes; allowed are {MAX_CHAT_TEMPLATE_BYTES}"
        )
    return template


def ordered_ids(first: int | None, others: Iterable[int]) -> tuple[int, ...]:
    """`first` (if any) and then the others, each once, ascending."""
    rest = sorted(set(others) - {first})
    return tuple(rest) if first is None else (first, *rest)


def dump_json(value: Any) -> str:
    """Compact JSON for the tokenizers library."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
