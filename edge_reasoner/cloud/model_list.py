"""Which model to ask for, out of what an endpoint's `/models` says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edge_reasoner.cloud.faults import fault_of, fix_surrogates, parse_json
from edge_reasoner.errors import CloudProtocolError

_MAX_ID_CHARS = 400
_MAX_CONTEXT_TOKENS = 2**31
#: words in a name, or in what the endpoint says a model is, of models that hold no conversation
_OTHER_WORDS = re.compile(
    r"embed|rerank|whisper|transcri|moderation|stable-diffusion|sdxl|dall-e|gpt-image|imagen|colbert|minilm"
    r"|(?<![a-z])(?:tts|asr|stt|ocr|e5|bge|gte|clip|siglip|flux|veo|sora|guard|llamaguard|speech|realtime"
    r"|image-generation|text-to-image|text-to-speech|image|audio|rank|classifier|diffusion"
    r"|davinci-002|babbage-002)(?![a-z])|turbo-instruct"
)
#: keys of objects that are no model
_NO_IDS = frozenset(("error", "detail", "meta", "metadata", "links", "_links", "pagination", "message"))
_CONTEXT_KEYS = ("max_model_len", "context_length", "context_window", "max_context_length", "n_ctx")


@dataclass(frozen=True)
class ListedModel:
    """A model that an endpoint serves. `context_tokens` is None where the list does not say."""

    id: str
    context_tokens: int | None = None


def first_chat_model(body: bytes) -> ListedModel:
    """The first listed model that can chat, as far as names and types tell.

    Takes `{"data": […]}`, `{"models": […]}`, a bare list, or models by their id. Raises CloudProtocolError.
    """
    try:
        value = parse_json(body)
    except ValueError as error:
        raise CloudProtocolError(f"not a model list: {error}") from error
    if isinstance(value, dict) and value.get("error"):
        raise CloudProtocolError(f"no model list{fault_of(value).shown}")
    listed = False
    for model, said in _entries(_items(value)):
        listed = True
        if not any(_OTHER_WORDS.search(text.lower()) for text in (model, *said)):
            return ListedModel(model, _context_tokens(value, model))
    raise CloudProtocolError("lists no model that can chat" if listed else "lists no model")


def _items(value: Any) -> Any:
    if isinstance(value, dict):
        for key in ("data", "models"):
            if isinstance(value.get(key), (list, dict)):
                return value[key]
        return {name: item for name, item in value.items() if isinstance(item, dict) and name not in _NO_IDS}
    return value


def _entries(items: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(id, what it is said to be) of each model."""
    for key, item in _pairs(items):
        said: tuple[str, ...] = ()
        if isinstance(item, str):
            name = item
        elif isinstance(item, dict):
            named = [item.get(field) for field in ("id", "model", "name", "slug")]
            name = str(next((text for text in named if _is_id(text)), key or ""))
            said = tuple(
                text
                for field in ("type", "task", "pipeline_tag", "mode", "capability")
                if isinstance(text := item.get(field), str)
            )
        else:
            continue
        if _is_id(name) and fix_surrogates(name) == name:
            yield name, said


def _pairs(items: Any) -> Iterator[tuple[str | None, Any]]:
    if isinstance(items, dict):
        yield from items.items()
    elif isinstance(items, list):
        for item in items:
            yield None, item


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= _MAX_ID_CHARS


def _context_tokens(value: Any, model: str) -> int | None:
    for key, item in _pairs(_items(value)):
        if isinstance(item, dict) and model in (key, *(item.get(k) for k in ("id", "model", "name", "slug"))):
            counts = [item.get(field) for field in _CONTEXT_KEYS]
            for count in counts:
                if isinstance(count, int) and not isinstance(count, bool) and 0 < count < _MAX_CONTEXT_TOKENS:
                    return count
    return None
