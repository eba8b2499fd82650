"""Text to token ids and back, including text that arrives one token at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from edge_reasoner.contract.bundle.tokenizer_check import CheckedTokenizer, check_tokenizer
from edge_reasoner.contract.bundle.tokenizer_files import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TokenizerConfig,
    tokenizer_faults,
)
from edge_reasoner.errors import BundleError, InputError

#: A text longer than this is refused before it is tokenized.
MAX_TEXT_CHARS = 4_000_000
#: bytes that a text may have after all the normalizers; the library keeps 16 bytes of offsets for each
_MAX_NORMALIZED_BYTES = 16 * 1024 * 1024
#: pieces that a model may try for one text
_MAX_EFFORT = 256 * 1024 * 1024
#: characters that one `decode` may make
_MAX_DECODED_CHARS = 256 * 1024 * 1024

#: a text up to this length is read whatever the context: that costs next to nothing
_SHORT_TEXT_CHARS = 65_536

_REPLACEMENT = "\ufffd"
_MANY_TOKENS = 16


class TextTokenizer:
    """Encodes and decodes text. Immutable after construction and safe to share between threads."""

    def __init__(
        self, tokenizer: Tokenizer, checked: CheckedTokenizer, config: TokenizerConfig, vocab_size: int | None
    ) -> None:
        self._tokenizer = tokenizer
        self._max_text_bytes = int(
            min(_MAX_NORMALIZED_BYTES / checked.growth, _MAX_EFFORT / (checked.growth * checked.effort))
        )
        self._max_decoded_ids = _MAX_DECODED_CHARS // max(1, checked.token_chars)
        self._model_vocab_size = vocab_size
        self.config = config
        self._byte_ids: frozenset[int] = frozenset()
        if tokenizer.decoder is not None and _uses_byte_fallback(_state(tokenizer.decoder)):
            ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
            self._byte_ids = frozenset(i for i in ids if i is not None)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._required_id("bos_token", config.bos_token) if config.add_bos else None

    @classmethod
    def from_files(
        cls, tokenizer_json: bytes, config: TokenizerConfig, *, where: str, vocab_size: int | None = None
    ) -> TextTokenizer:
        """Builds a tokenizer from file contents. Raises BundleError when they are malformed or not allowed.

        `vocab_size`: how many token ids the model knows, where there is one.
        """
        checked = check_tokenizer(tokenizer_json, where, BundleError)
        with tokenizer_faults(where, BundleError):
            return cls(Tokenizer.from_buffer(checked.json), checked, config, vocab_size)

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of `text`.

        `add_special` applies the definition's own post-processor ([CLS] … [SEP] of an encoder); chat
        templates have written theirs already. Raises InputError for text that is too long or holds lone
        surrogates, BundleError where the definition itself fails (an unknown token that is no token, an id
        that the model does not know).
        """
        if len(text) > MAX_TEXT_CHARS:
            raise InputError(f"text of {len(text)} characters; at most {MAX_TEXT_CHARS} are allowed")
        try:
            size_bytes = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InputError(f"text is not valid Unicode at character {error.start}") from error
        if size_bytes > self._max_text_bytes:
            raise InputError(
                f"text of {size_bytes} bytes; at most {self._max_text_bytes} are allowed for this tokenizer"
            )
        with tokenizer_faults(TOKENIZER_FILE, BundleError):
            if len(text) > _SHORT_TEXT_CHARS:
                # as a batch, since only then other threads run meanwhile; without offsets it is quicker
                batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special)
                return list(batch[0].ids)
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        if self._model_vocab_size is not None and ids and max(ids) >= self._model_vocab_size:
            raise BundleError(
                f"{TOKENIZER_FILE}: gives the token {max(ids)}; the model knows {self._model_vocab_size}"
            )
        return ids

    def most_chars(self, tokens: int) -> int:
        """The longest text, in characters, that is worth reading where `tokens` may be used: no token is
        longer than the vocabulary's longest. At least 65,536."""
        return max(_SHORT_TEXT_CHARS, tokens * self._longest_token_chars)

    @cached_property
    def _longest_token_chars(self) -> int:
        # looked up only once a text is long: a vocabulary takes a moment to be listed
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `token_ids`. Ids outside the vocabulary give nothing. Raises BundleError as `encode`."""
        if len(token_ids) > self._max_decoded_ids:
            raise BundleError(
                f"{TOKENIZER_FILE}: {len(token_ids)} tokens to decode; its long tokens allow "
                f"{self._max_decoded_ids}"
            )
        with tokenizer_faults(TOKENIZER_FILE, BundleError):
            text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact spelling, or None."""
        with tokenizer_faults(TOKENIZER_FILE, BundleError):
            found: int | None = self._tokenizer.token_to_id(token)
        return found

    def spelling(self, token_id: int) -> str:
        """The token as the vocabulary writes it; "" for an id that has none."""
        with tokenizer_faults(TOKENIZER_FILE, BundleError):
            found: str | None = self._tokenizer.id_to_token(token_id)
        return found or ""

    def is_byte(self, token_id: int) -> bool:
        """Whether this is a byte-fallback token, whose text depends on its neighbours."""
        return token_id in self._byte_ids

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out."""
        return token_id in self._special_ids

    def _required_id(self, role: str, token: str | None) -> int:
        found = None if token is None else self.token_id(token)
        if found is None:
            raise BundleError(f"{TOKENIZER_CONFIG_FILE}: {role} {token!r} is not in the vocabulary")
        return found


class IncrementalDecoder:
    """Turns a growing list of token ids into text pieces whose concatenation is the full decode.

    The text of one token depends on those before it (merged UTF-8 bytes, a leading space that only the first
    token loses), so each step decodes a window: the tokens shown last, as context, and everything since.
    Text that a later token may still change is held back: an unfinished UTF-8 sequence, and a run of
    byte-fallback tokens, which the decoder judges as a whole.

    The library's own `DecodeStream` is not used: with byte fallback it raises, or differs from the full
    decode, as soon as a run of byte tokens is no UTF-8, and it never gives the text that is held back at the
    end.
    """

    def __init__(self, tokenizer: TextTokenizer, *, shows: Callable[[str], bool] | None = None) -> None:
        """`shows`: which special tokens, by their spelling, are text all the same; None: none."""
        self._tokenizer = tokenizer
        self._shows = shows
        self._window: list[int] = []
        self._waiting_tokens = 0  # how many more tokens are taken before the window is looked at again
        self._shown_tokens = 0  # how many of the window's tokens are context whose text was returned

    def push(self, token_id: int) -> str:
        """Adds one token and returns the text that is now final (often empty)."""
        if self._tokenizer.is_special(token_id):
            spelling = self._tokenizer.spelling(token_id)
            if self._shows is not None and self._shows(spelling):
                return self.flush() + spelling
            return ""  # as if it were not there: it does not even end a run of byte tokens
        self._window.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        if self._waiting_tokens:
            self._waiting_tokens -= 1
            return ""
        before, now = self._texts()
        if len(now) <= len(before) or now.endswith(_REPLACEMENT):
            # No character needs so many tokens: a vocabulary without text must not cost a square.
            self._waiting_tokens = len(self._window) // 4 if len(self._window) > _MANY_TOKENS else 0
            return ""
        self._window = self._window[self._shown_tokens :]
        self._shown_tokens = len(self._window)
        return now[len(before) :]

    def flush(self) -> str:
        """Returns the text still held back (an unfinished sequence shows as U+FFFD) and starts afresh."""
        before, now = self._texts()
        self._window, self._shown_tokens, self._waiting_tokens = [], 0, 0
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._window[: self._shown_tokens])
        return before, self._tokenizer.decode(self._window)


def _state(decoder: Any) -> object:
    # The whole tokenizer.json may be tens of megabytes; the decoder alone says what is asked here.
    return json.loads(decoder.__getstate__())


def _uses_byte_fallback(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "ByteFallback":
        return True
    children = decoder.get("decoders")
    return isinstance(children, list) and any(_uses_byte_fallback(child) for child in children)
