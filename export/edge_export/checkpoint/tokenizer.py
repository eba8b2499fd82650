"""Loads a checkpoint's tokenizer: the one entry for Hugging Face directories and GGUF files.

A directory needs `tokenizer.json` (or a SentencePiece `tokenizer.model`); `tokenizer_config.json`,
`special_tokens_map.json`, `generation_config.json`, `config.json` and `chat_template.jinja` add what they
know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from edge_export.checkpoint.added_tokens import (
    broken_tokens,
    check_added_tokens,
    misnumbered,
    own_tokens,
    tokens_of_side_files,
    with_added_tokens,
)
from edge_export.checkpoint.chat_template_files import MAX_CONFIG_BYTES, find_chat_template
from edge_export.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from edge_export.checkpoint.json_file import is_there, read_json_object, read_text
from edge_export.checkpoint.sentencepiece_model import tokenizer_from_sentencepiece
from edge_export.checkpoint.tokenizer_files import (
    END_OF_GENERATION,
    MAX_TOKENIZER_JSON_BYTES,
    MAX_VOCAB_TOKENS,
    TokenizerFiles,
    canonical_json,
    dump_json,
    ordered_ids,
    parse_tokenizer,
)
from edge_reasoner.contract.bundle.tokenizer_files import tokenizer_faults
from edge_reasoner.errors import CheckpointError

_SideFiles = Mapping[str, Mapping[str, Any]]
_SIDE_FILES: Final = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    "added_tokens.json",
)
#: what they say is said elsewhere, or has a default
_DISPENSABLE: Final = frozenset({"special_tokens_map.json", "generation_config.json"})
_ROLES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
#: as the bundle's TokenizerConfig allows
_MAX_ROLE_CHARS: Final = 200


@dataclass(frozen=True)
class _Defaults:
    """What a tokenizer says of itself where no side file does: a tokenizer.json says nothing."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    add_bos: bool = False
    unk_token: str | None = None


_NO_DEFAULTS: Final = _Defaults()


def load_tokenizer_files(path: Path) -> TokenizerFiles:
    """The tokenizer of the checkpoint at `path`: a `.gguf` file or a Hugging Face directory.

    Raises CheckpointError with one line for anything missing, corrupt, too large or of an unsupported kind.
    """
    if path.is_dir():
        return _from_directory(path)
    if path.is_file():
        return tokenizer_from_gguf(path)
    raise CheckpointError(f"{path}: no such model; a GGUF file or a Hugging Face directory is needed")


def limit_vocabulary(files: TokenizerFiles, rows: int) -> TokenizerFiles:
    """The tokenizer for a model whose embedding has `rows` rows: added tokens beyond them are dropped.

    Text-only Gemma 3 checkpoints list `<image_soft_token>` one past their embedding; typed by a user it would
    index out of range. Raises CheckpointError when an ordinary or a declared token lies beyond the embedding.
    """
    if files.vocab_size <= rows:
        return files
    description = json.loads(files.tokenizer_json)
    kept = [token for token in description["added_tokens"] if token["id"] < rows]
    dropped = [token["content"] for token in description["added_tokens"] if token["id"] >= rows]
    for text in dropped:
        if files.chat_template is not None and text in files.chat_template:
            raise CheckpointError(
                f"tokenizer.json: the chat template writes the added token {text[:80]!r}, which lies beyond "
                f"the {rows} tokens that the model embeds"
            )
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, dict):
        left_out = set(dropped)
        description["model"]["vocab"] = {
            text: i for text, i in vocabulary.items() if i < rows or text not in left_out
        }
    tokenizer = parse_tokenizer(dump_json({**description, "added_tokens": kept}), "tokenizer.json")
    size = _check_ids(tokenizer, "tokenizer.json")
    declared = (*files.eos_token_ids, *(() if files.bos_token_id is None else (files.bos_token_id,)))
    if size > rows or any(i >= rows for i in declared):
        raise CheckpointError(
            f"tokenizer.json: token ids go up to {files.vocab_size - 1}; the model embeds only {rows} tokens"
        )
    return replace(
        files,
        tokenizer_json=canonical_json(tokenizer, "tokenizer.json"),
        special_tokens=tuple(token["content"] for token in kept if token["special"]),
        vocab_size=size,
        warnings=(*files.warnings, *_dropped(dropped, rows)),
    )


def _dropped(texts: list[str], rows: int) -> tuple[str, ...]:
    if not texts:
        return ()
    shown = ", ".join(repr(text[:80]) for text in texts[:3])
    return (
        f"tokenizer.json: {len(texts)} added tokens lie beyond the {rows} tokens that the model embeds and "
        f"are left out: {shown}",
    )


def _from_directory(path: Path) -> TokenizerFiles:
    side, damaged = _side_files(path)
    files = _read_directory(path, side)
    return replace(files, warnings=(*damaged, *files.warnings))


def _side_files(path: Path) -> tuple[dict[str, Mapping[str, Any]], tuple[str, ...]]:
    """Every side file's object, and warnings of damaged ones that a model can do without."""
    side: dict[str, Mapping[str, Any]] = {}
    warnings = []
    for name in _SIDE_FILES:
        try:
            side[name] = read_json_object(path / name, MAX_CONFIG_BYTES, optional=True)
        except CheckpointError as error:
            if name not in _DISPENSABLE:
                raise
            side[name] = {}
            warnings.append(f"{error}; it is left aside")
    return side, tuple(warnings)


def _read_directory(path: Path, side: _SideFiles) -> TokenizerFiles:
    template = find_chat_template(path).text
    source = path / "tokenizer.json"
    if is_there(source):
        text = read_text(source, MAX_TOKENIZER_JSON_BYTES)
        return _with_side_files(text, _NO_DEFAULTS, side, template, str(source))
    source = path / "tokenizer.model"
    if is_there(source):
        base = tokenizer_from_sentencepiece(source)
        return _with_side_files(base.tokenizer_json.decode("utf-8"), base, side, template, str(source))
    raise CheckpointError(
        f"{path}: has no tokenizer.json or tokenizer.model; save one with transformers: "
        "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    )


def _with_added_tokens(text: str, side: _SideFiles, where: str) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer with every added token under its own id and in one piece, and warnings."""
    with tokenizer_faults(where, CheckpointError):
        return _try_added_tokens(text, side, where)


def _try_added_tokens(text: str, side: _SideFiles, where: str) -> tuple[Tokenizer, tuple[str, ...]]:
    tokenizer = parse_tokenizer(text, where)
    description = json.loads(text)
    own = own_tokens(description)
    beside = tokens_of_side_files(
        side["added_tokens.json"], side["tokenizer_config.json"], _special_texts(side), where
    )
    listed = {token.content for token in own}
    tokens = (*own, *(token for token in beside if token.content not in listed))
    numbers = {token.content: token.id for token in own}
    for token in beside:
        if numbers.get(token.content, token.id) != token.id:
            raise CheckpointError(
                f"{where}: gives {token.content[:80]!r} the id {numbers[token.content]}; the files beside it "
                f"say {token.id}"
            )
    if misnumbered(tokenizer, tokens):
        description = with_added_tokens(description, tokens, where)
        tokenizer = parse_tokenizer(dump_json(description), where)
    if broken := broken_tokens(tokenizer, tokens):
        # A normalizer changes their text before it is looked for: look for it before.
        early = set(broken)
        tokens = tuple(replace(token, normalized=False) if token in early else token for token in tokens)
        description["added_tokens"] = [asdict(token) for token in tokens]
        tokenizer = parse_tokenizer(dump_json(description), where)
    return tokenizer, check_added_tokens(tokenizer, tokens, where)


def _special_texts(side: _SideFiles) -> frozenset[str]:
    """Texts that the side files name in a role, or as additional special tokens."""
    texts: set[str] = set(END_OF_GENERATION)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        named = [side[name].get(role) for role in _ROLES]
        more = side[name].get("additional_special_tokens")
        for value in (*named, *(more if isinstance(more, list) else ())):
            text = value.get("content") if isinstance(value, dict) else value
            texts |= {text} if isinstance(text, str) else set()
    return frozenset(texts)


def _with_side_files(
    text: str, base: _Defaults | TokenizerFiles, side: _SideFiles, template: str | None, where: str
) -> TokenizerFiles:
    """The tokenizer in the JSON `text`; what the side files do not say is as in `base`."""
    tokenizer, warnings = _with_added_tokens(text, side, where)
    names = _Names(tokenizer, where, _check_ids(tokenizer, where))
    specials = names.special()
    flag = side["tokenizer_config.json"].get("add_bos_token")
    roles, unknown = names.roles(side, {"bos_token": flag is not False, "eos_token": True})
    bos = base.bos_token_id if roles["bos_token"] is None else roles["bos_token"]
    eos = roles["eos_token"]
    unknown = (*unknown, *_unknown_specials(side, tokenizer, where), *_bos_warnings(flag, bos, where))
    declared = (*names.declared_ids("generation_config.json", side), *names.declared_ids("config.json", side))
    if eos is None:
        eos = declared[0] if declared else next(iter(base.eos_token_ids), None)
    named = [i for i, token in specials.items() if token in END_OF_GENERATION]
    prepends = base.add_bos or _prepends(tokenizer, bos)
    return TokenizerFiles(
        tokenizer_json=canonical_json(tokenizer, where),
        chat_template=template,
        bos_token_id=bos,
        eos_token_ids=ordered_ids(eos, (*declared, *named)),
        add_bos=bos is not None and (flag if isinstance(flag, bool) else prepends),
        bos_token=names.text(bos),
        eos_token=names.text(eos),
        unk_token=names.text(roles["unk_token"]) or base.unk_token,
        pad_token=names.text(roles["pad_token"]),
        special_tokens=tuple(specials.values()),
        vocab_size=names.vocab_size,
        warnings=(*warnings, *unknown),
    )


def _unknown_specials(side: _SideFiles, tokenizer: Tokenizer, where: str) -> tuple[str, ...]:
    """Warnings of special tokens that a side file names and no vocabulary has."""
    named: dict[str, None] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for field in ("additional_special_tokens", "extra_special_tokens"):
            value = side[name].get(field)
            entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
            named.update((text, None) for text in texts if isinstance(text, str) and text)
    unknown = [text for text in named if tokenizer.token_to_id(text) is None]
    if not unknown:
        return ()
    shown = ", ".join(repr(text[:80]) for text in unknown[:3])
    return (
        f"{where}: {len(unknown)} special tokens that the files beside it name are not in it and are read as "
        f"plain text: {shown}",
    )


def _bos_warnings(flag: Any, bos: int | None, where: str) -> tuple[str, ...]:
    """Warnings of an `add_bos_token` that says nothing, or that nothing can follow."""
    if flag is not None and not isinstance(flag, bool):
        shown = repr(flag)[:40]
        return (f"{where}: add_bos_token of tokenizer_config.json is {shown}, not true or false; left aside",)
    if flag and bos is None:
        return (f"{where}: add_bos_token is true, but there is no bos_token; none is added",)
    return ()


def _check_ids(tokenizer: Tokenizer, where: str) -> int:
    """Largest id + 1. Raises CheckpointError unless every token has one id of its own, within bounds."""
    ids = list(tokenizer.get_vocab(with_added_tokens=True).values())
    if not ids:
        raise CheckpointError(f"{where}: the vocabulary is empty")
    if len(set(ids)) != len(ids):
        raise CheckpointError(f"{where}: two tokens share one id")
    if max(ids) >= MAX_VOCAB_TOKENS:
        raise CheckpointError(f"{where}: token id {max(ids)}; at most {MAX_VOCAB_TOKENS - 1} is allowed")
    return max(ids) + 1


def _prepends(tokenizer: Tokenizer, token_id: int | None) -> bool:
    """Whether the tokenizer's own post-processor starts every text with `token_id`."""
    with tokenizer_faults("tokenizer.json", CheckpointError):
        first = tokenizer.encode("a").ids[:1]
    return first == [token_id] and token_id is not None and tokenizer.token_to_id("a") != token_id


@dataclass(frozen=True)
class _Names:
    """Looks up the ids that the side files speak of."""

    tokenizer: Tokenizer
    where: str
    vocab_size: int

    def special(self) -> dict[int, str]:
        """Special tokens by id, ascending."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {i: added[i].content for i in sorted(added) if added[i].special}

    def text(self, token_id: int | None) -> str | None:
        """The token's text; None for none."""
        return None if token_id is None else str(self.tokenizer.id_to_token(token_id))

    def roles(
        self, side: _SideFiles, needed: Mapping[str, bool]
    ) -> tuple[dict[str, int | None], tuple[str, ...]]:
        """Role → token id or None: the first file that names a role decides.

        Also warnings of names that are no tokens. Raises CheckpointError if the role is `needed`.
        """
        found: dict[str, int | None] = {}
        warnings = []
        for role in _ROLES:
            name, text = self._named(role, side)
            known = isinstance(text, str) and len(text) <= _MAX_ROLE_CHARS
            found[role] = self.tokenizer.token_to_id(text) if known else None
            if text is None or found[role] is not None:
                continue
            problem = f"{self.where}: {name} names the {role} {repr(text)[:82]}, which is not a token"
            if needed.get(role):
                raise CheckpointError(problem)
            warnings.append(f"{problem}; the model is used without one")
        return found, tuple(warnings)

    def _named(self, role: str, side: _SideFiles) -> tuple[str, Any]:
        """The file that names a token for `role`, and what it names."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            value = side[name].get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if text is not None and text != "":
                return name, text
        return "", None

    def declared_ids(self, name: str, side: _SideFiles) -> tuple[int, ...]:
        """`eos_token_id` of a configuration file: none, one or a list."""
        value = side[name].get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        listed = [token_id for token_id in listed if token_id is not None and token_id != -1]
        for token_id in listed:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise CheckpointError(
                    f"{self.where}: {name} has the eos_token_id {token_id!r}; "
                    f"token ids are 0 … {self.vocab_size - 1}"
                )
        return tuple(listed)
