"""Added tokens: every one keeps its id and stays one piece, whichever file of the checkpoint speaks of it.

tokenizer.json lists its own; `added_tokens.json` (text → id) and `added_tokens_decoder` of
tokenizer_config.json (id → text and flags) may add more, which is all there is beside a SentencePiece model.
The `tokenizers` library gives an added token the next free id, whatever the file says, unless its model's
vocabulary has the token already; so the tokens it would renumber are written into that vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from tokenizers import Tokenizer

from edge_export.checkpoint.tokenizer_files import MAX_TOKEN_BYTES, MAX_VOCAB_TOKENS
from edge_reasoner.errors import CheckpointError

_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SHOWN_CHARS: Final = 80


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before the rest is tokenized."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


def tokens_of_side_files(
    added: Mapping[str, Any], config: Mapping[str, Any], special: frozenset[str], where: str
) -> tuple[AddedToken, ...]:
    """The tokens of added_tokens.json (`added`) and of tokenizer_config.json (`config`), by id.

    `special` are texts that count as special where no flag says so. Raises CheckpointError where an entry is
    malformed, or two entries contradict each other.
    """
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{where}: added_tokens_decoder of tokenizer_config.json must be an object")
    tokens = [_from_decoder(key, entry, where) for key, entry in decoder.items()]
    flagged = {token.content: token for token in tokens}
    for content, token_id in added.items():
        if content not in flagged:
            tokens.append(AddedToken(_id(token_id, content, where), content, special=content in special))
        else:
            tokens.append(replace(flagged[content], id=_id(token_id, content, where)))
    return tuple(sorted(set(_without_contradictions(tokens, where)), key=lambda token: token.id))


def own_tokens(description: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    """The added tokens of a tokenizer.json that the library has accepted."""
    listed = description.get("added_tokens") or []
    fields = ("id", "content", *_FLAGS)
    return tuple(AddedToken(**{name: entry[name] for name in fields if name in entry}) for entry in listed)


def with_added_tokens(
    description: Mapping[str, Any], tokens: Iterable[AddedToken], where: str
) -> dict[str, Any]:
    """The tokenizer.json `description` with exactly these added tokens, each under its own id.

    Raises CheckpointError when an id belongs to another token already, or the model takes no such entry.
    """
    tokens = _without_contradictions(list(tokens), where)
    model = dict(description["model"])
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        raise CheckpointError(
            f"{where}: its added tokens are not numbered as {str(model.get('type'))[:40]!r} models are"
        )
    texts = {token_id: text for text, token_id in vocabulary.items()}
    merged = dict(vocabulary)
    for token in tokens:
        if merged.get(token.content, token.id) != token.id:
            raise CheckpointError(
                f"{where}: the added token {_shown(token.content)} has the id {token.id}, but the vocabulary "
                f"gives it {merged[token.content]}"
            )
        if texts.get(token.id, token.content) != token.content:
            raise CheckpointError(
                f"{where}: the added token {_shown(token.content)} has the id {token.id}, which belongs to "
                f"the token {_shown(texts[token.id])}"
            )
        merged[token.content] = token.id
    model["vocab"] = merged
    return {**description, "model": model, "added_tokens": [asdict(token) for token in tokens]}


def misnumbered(tokenizer: Tokenizer, tokens: Iterable[AddedToken]) -> bool:
    """Whether the library knows a token under another id than its own, or does not know it as added."""
    known = tokenizer.get_added_tokens_decoder()
    return any(token.id not in known or known[token.id].content != token.content for token in tokens)


def broken_tokens(tokenizer: Tokenizer, tokens: Iterable[AddedToken]) -> tuple[AddedToken, ...]:
    """The tokens whose text does not encode to exactly their id."""
    return tuple(
        token
        for token in tokens
        if tokenizer.encode(token.content, add_special_tokens=False).ids != [token.id]
    )


def check_added_tokens(tokenizer: Tokenizer, tokens: Iterable[AddedToken], where: str) -> tuple[str, ...]:
    """Warnings of tokens that do not decode to their text.

    Raises CheckpointError naming the first that does not encode to exactly its id.
    """
    tokens = tuple(tokens)
    for token in broken_tokens(tokenizer, tokens):
        found = tokenizer.encode(token.content, add_special_tokens=False).ids
        raise CheckpointError(
            f"{where}: the added token {_shown(token.content)} is number {token.id}, but its text encodes to "
            f"{found[:8]}"
        )
    changed = [
        token.content
        for token in tokens
        if tokenizer.decode([token.id], skip_special_tokens=False).strip() != token.content.strip()
    ]
    if not changed:
        return ()
    shown = ", ".join(map(_shown, changed[:3]))
    return (f"{where}: {len(changed)} added tokens decode to another text than their own: {shown}",)


def _from_decoder(key: str, entry: Any, where: str) -> AddedToken:
    if isinstance(entry, str):
        entry = {"content": entry}
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(content, str) or not key.isascii() or not key.isdigit() or len(key) > 12:
        raise CheckpointError(
            f"{where}: added_tokens_decoder of tokenizer_config.json has a malformed entry {_shown(key)}"
        )
    flags = {name: entry.get(name) is True for name in _FLAGS}
    return AddedToken(_id(int(key), content, where), content, **flags)


def _id(value: Any, content: str, where: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_VOCAB_TOKENS:
        raise CheckpointError(
            f"{where}: the added token {_shown(content)} has the id {repr(value)[:40]}; allowed is 0 to "
            f"{MAX_VOCAB_TOKENS - 1}"
        )
    if not content or len(content.encode("utf-8", "surrogatepass")) > MAX_TOKEN_BYTES:
        raise CheckpointError(
            f"{where}: the text of the added token {value} must have 1 to {MAX_TOKEN_BYTES} bytes"
        )
    return value


def _without_contradictions(tokens: list[AddedToken], where: str) -> list[AddedToken]:
    """Each text once. Raises CheckpointError where a text has two ids, or an id two texts."""
    ids: dict[str, AddedToken] = {}
    texts: dict[int, str] = {}
    for token in tokens:
        if (first := ids.setdefault(token.content, token)).id != token.id:
            raise CheckpointError(
                f"{where}: the added token {_shown(token.content)} has two ids, {first.id} and {token.id}"
            )
        if texts.setdefault(token.id, token.content) != token.content:
            raise CheckpointError(
                f"{where}: two added tokens have the id {token.id}: {_shown(texts[token.id])} and "
                f"{_shown(token.content)}"
            )
    return list(ids.values())


def _shown(text: str) -> str:
    return repr(text[:_SHOWN_CHARS])
