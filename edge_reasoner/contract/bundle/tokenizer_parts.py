"""The parts that a tokenizer.json may be made of, as the `tokenizers` library writes them.

Names of types and fields are the library's. A part or field that is not here is refused: what it would do is
not known. `tokenizer_check.py` says what is checked beyond types and lengths.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Union

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

MAX_TOKEN_CHARS: Final = 4096
#: one more than the largest token id that there may be
MAX_VOCAB_TOKENS: Final = 1 << 21

TokenId = Annotated[int, Meta(ge=0, lt=MAX_VOCAB_TOKENS)]
TokenText = Annotated[str, Meta(min_length=1, max_length=MAX_TOKEN_CHARS)]
#: a prefix, suffix or replacement
Affix = Annotated[str, Meta(max_length=64)]
OneChar = Annotated[str, Meta(min_length=1, max_length=1)]
Few = Annotated[int, Meta(ge=0, le=16)]
Behavior = Literal["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


class AddedToken(Struct, frozen=True, forbid_unknown_fields=True):
    """A text that is one token wherever it stands."""

    id: TokenId
    content: TokenText
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class Pattern(Struct, frozen=True, forbid_unknown_fields=True):
    """What is looked for: a text or an expression, exactly one of them."""

    String: Annotated[str, Meta(max_length=256)] | UnsetType = UNSET
    Regex: Annotated[str, Meta(max_length=1000)] | UnsetType = UNSET


class Replace(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="Replace"):
    """Normalizer or decoder."""

    pattern: Pattern
    content: Affix


class ByteLevel(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="ByteLevel"):
    """Pre-tokenizer, post-processor and decoder of GPT-2."""

    add_prefix_space: bool = True
    trim_offsets: bool = True
    use_regex: bool = True


class Metaspace(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="Metaspace"):
    """Pre-tokenizer and decoder of SentencePiece, in the library's older and newer form."""

    replacement: OneChar = "▁"
    str_rep: Affix | UnsetType = UNSET
    add_prefix_space: bool | UnsetType = UNSET
    prepend_scheme: Literal["always", "never", "first"] | UnsetType = UNSET
    split: bool | UnsetType = UNSET


class _Normalizer(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Changes the text."""


class BertNormalizer(_Normalizer, frozen=True, tag="BertNormalizer"):
    """Lower case, accents, control characters, spaces around Chinese characters."""

    clean_text: bool = True
    handle_chinese_chars: bool = True
    strip_accents: bool | None = None
    lowercase: bool = True


class StripNormalizer(_Normalizer, frozen=True, tag="Strip"):
    """Removes spaces at the ends."""

    strip_left: bool = True
    strip_right: bool = True


class StripAccents(_Normalizer, frozen=True, tag="StripAccents"):
    """Removes combining marks."""


class Nfc(_Normalizer, frozen=True, tag="NFC"):
    """Unicode's composed form."""


class Nfd(_Normalizer, frozen=True, tag="NFD"):
    """Unicode's decomposed form."""


class Nfkc(_Normalizer, frozen=True, tag="NFKC"):
    """Unicode's composed compatibility form."""


class Nfkd(_Normalizer, frozen=True, tag="NFKD"):
    """Unicode's decomposed compatibility form."""


class Lowercase(_Normalizer, frozen=True, tag="Lowercase"):
    """Lower case."""


class Nmt(_Normalizer, frozen=True, tag="Nmt"):
    """Control characters and kinds of spaces."""


class ByteLevelNormalizer(_Normalizer, frozen=True, tag="ByteLevel"):
    """Bytes as GPT-2 writes them."""


class Precompiled(_Normalizer, frozen=True, tag="Precompiled"):
    """SentencePiece's map of characters."""

    precompiled_charsmap: Annotated[bytes, Meta(max_length=1 << 20)]


class Prepend(_Normalizer, frozen=True, tag="Prepend"):
    """Puts a text before the text."""

    prepend: Affix


class NormalizerSequence(_Normalizer, frozen=True, tag="Sequence"):
    """One after the other."""

    normalizers: tuple[Normalizer, ...]


class _PreTokenizer(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Cuts the text into pieces."""


class BertPreTokenizer(_PreTokenizer, frozen=True, tag="BertPreTokenizer"):
    """At spaces and punctuation."""


class Whitespace(_PreTokenizer, frozen=True, tag="Whitespace"):
    """Words and what is between them."""


class WhitespaceSplit(_PreTokenizer, frozen=True, tag="WhitespaceSplit"):
    """At spaces."""


class Punctuation(_PreTokenizer, frozen=True, tag="Punctuation"):
    """At punctuation."""

    behavior: Behavior = "Isolated"


class Digits(_PreTokenizer, frozen=True, tag="Digits"):
    """At digits."""

    individual_digits: bool = False


class Split(_PreTokenizer, frozen=True, tag="Split"):
    """Where the pattern is found."""

    pattern: Pattern
    behavior: Behavior
    invert: bool = False


class PreTokenizerSequence(_PreTokenizer, frozen=True, tag="Sequence"):
    """One after the other."""

    pretokenizers: tuple[PreTokenizer, ...]


class SpecialTokenPlace(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a template has a special token, or the text."""

    id: TokenText
    type_id: Few = 0


class TemplatePiece(Struct, frozen=True, forbid_unknown_fields=True):
    """A special token or the text: exactly one of them."""

    SpecialToken: SpecialTokenPlace | UnsetType = UNSET
    Sequence: SpecialTokenPlace | UnsetType = UNSET


class TemplateSpecial(Struct, frozen=True, forbid_unknown_fields=True):
    """The tokens that a name in a template stands for."""

    id: TokenText
    ids: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=16)]
    tokens: Annotated[tuple[TokenText, ...], Meta(min_length=1, max_length=16)]


class _Processor(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Adds special tokens."""


class TemplateProcessing(_Processor, frozen=True, tag="TemplateProcessing"):
    """Special tokens around a text."""

    single: Annotated[tuple[TemplatePiece, ...], Meta(max_length=16)]
    pair: Annotated[tuple[TemplatePiece, ...], Meta(max_length=16)]
    special_tokens: Annotated[dict[str, TemplateSpecial], Meta(max_length=64)]


class BertProcessing(_Processor, frozen=True, tag="BertProcessing"):
    """[CLS] … [SEP]."""

    sep: tuple[TokenText, TokenId]
    cls: tuple[TokenText, TokenId]


class RobertaProcessing(_Processor, frozen=True, tag="RobertaProcessing"):
    """<s> … </s>."""

    sep: tuple[TokenText, TokenId]
    cls: tuple[TokenText, TokenId]
    trim_offsets: bool = True
    add_prefix_space: bool = True


class ProcessorSequence(_Processor, frozen=True, tag="Sequence"):
    """One after the other."""

    processors: tuple[PostProcessor, ...]


class _Decoder(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Makes text of tokens."""


class BpeDecoder(_Decoder, frozen=True, tag="BPEDecoder"):
    """A suffix marks the end of a word."""

    suffix: Affix = "</w>"


class WordPieceDecoder(_Decoder, frozen=True, tag="WordPiece"):
    """A prefix marks what continues a word."""

    prefix: Affix = "##"
    cleanup: bool = True


class Fuse(_Decoder, frozen=True, tag="Fuse"):
    """All pieces become one."""


class ByteFallback(_Decoder, frozen=True, tag="ByteFallback"):
    """Byte tokens become characters."""


class StripDecoder(_Decoder, frozen=True, tag="Strip"):
    """Removes a character at the ends."""

    content: OneChar
    start: Few
    stop: Few


class DecoderSequence(_Decoder, frozen=True, tag="Sequence"):
    """One after the other."""

    decoders: tuple[Decoder, ...]


class _Model(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Finds tokens in a piece."""


class Bpe(_Model, frozen=True, tag="BPE"):
    """Merges; the library checks that each is of tokens and makes a token."""

    vocab: Raw
    merges: Raw
    dropout: float | None = None
    unk_token: Annotated[str, Meta(max_length=MAX_TOKEN_CHARS)] | None = None
    continuing_subword_prefix: Affix | None = None
    end_of_word_suffix: Affix | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class WordPiece(_Model, frozen=True, tag="WordPiece"):
    """The longest piece of a word that is a token, and on."""

    vocab: Raw
    unk_token: TokenText = "[UNK]"
    continuing_subword_prefix: Affix = "##"
    max_input_chars_per_word: Annotated[int, Meta(ge=0, le=200)] = 100


class WordLevel(_Model, frozen=True, tag="WordLevel"):
    """A token for each word."""

    vocab: Raw
    unk_token: Annotated[str, Meta(max_length=MAX_TOKEN_CHARS)]


class Unigram(_Model, frozen=True, tag="Unigram"):
    """The likeliest pieces; a token's id is its place in the list."""

    vocab: tuple[tuple[str, float], ...]
    unk_id: int | None = None
    byte_fallback: bool = False


Normalizer = Union[  # noqa: UP007  # msgspec reads the union where it is used before it is made
    BertNormalizer,
    ByteLevelNormalizer,
    Lowercase,
    Nfc,
    Nfd,
    Nfkc,
    Nfkd,
    Nmt,
    NormalizerSequence,
    Precompiled,
    Prepend,
    Replace,
    StripAccents,
    StripNormalizer,
]
PreTokenizer = Union[  # noqa: UP007
    BertPreTokenizer,
    ByteLevel,
    Digits,
    Metaspace,
    PreTokenizerSequence,
    Punctuation,
    Split,
    Whitespace,
    WhitespaceSplit,
]
PostProcessor = Union[  # noqa: UP007
    BertProcessing, ByteLevel, ProcessorSequence, RobertaProcessing, TemplateProcessing
]
Decoder = Union[  # noqa: UP007
    BpeDecoder,
    ByteFallback,
    ByteLevel,
    DecoderSequence,
    Fuse,
    Metaspace,
    Replace,
    StripDecoder,
    WordPieceDecoder,
]
Model = Union[Bpe, Unigram, WordLevel, WordPiece]  # noqa: UP007

_NULL: Final = Raw(b"null")


class File(Struct, frozen=True, forbid_unknown_fields=True):
    """A tokenizer.json as it is read. Its truncation and padding are left aside."""

    model: Model
    version: Literal["1.0"] = "1.0"
    truncation: Raw = _NULL
    padding: Raw = _NULL
    added_tokens: tuple[AddedToken, ...] = ()
    normalizer: Normalizer | None = None
    pre_tokenizer: PreTokenizer | None = None
    post_processor: PostProcessor | None = None
    decoder: Decoder | None = None


class OldFile(Struct, frozen=True):
    """Of a tokenizer.json whose model does not name its type: the model's fields, and all the others."""

    model: dict[str, Raw]


class Written(Struct, frozen=True):
    """A tokenizer.json as the library is given it."""

    version: str
    truncation: None
    padding: None
    added_tokens: tuple[AddedToken, ...]
    normalizer: Normalizer | None
    pre_tokenizer: PreTokenizer | None
    post_processor: PostProcessor | None
    decoder: Decoder | None
    model: Model
