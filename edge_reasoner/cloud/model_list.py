"""Which model to ask for, out of what an endpoint's `/models` says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from edge_reasoner.cloud.faults import fault_of, fix_surrogates, parse_json
from edge_reasoner.errors import CloudProtocolError

_MAX_ID_CHARS = 400
_MAX_CONTEXT_TOKENS = 2**31
_MAX_DEPTH = 3
#: no endpoint serves as many
_MAX_LISTED = 20_000
#: words in a name, or in what the endpoint says a model is, of models that hold no conversation
_OTHER_WORDS = re.compile(
    r"embed|rerank|whisper|transcri|moderation|stable-diffusion|sdxl|dall-e|gpt-image|imagen|colbert|minilm"
    r"|mpnet|sentence-transformers|feature-extraction|similarity|fill-mask|wav2vec|musicgen|kandinsky|cogvideo"
    r"|shieldgemma|seedream|seedance|parakeet|ideogram|recraft|text-search|code-search|automatic-speech"
    r"|(?<![a-z])(?:x?tts|asr|stt|vad|(?:paddle)?ocr|e5|bge|gte|gtr|uae|clip|siglip|flux|veo|sora|guard"
    r"|llamaguard|speech|realtime|image-generation|text-to-image|text-to-speech|images?|audio|video|rank"
    r"|classifier|diffusion|sd[0-9.]*|bert|xlm-roberta|roberta|deberta|nomic-bert|splade|voyage|kokoro|piper"
    r"|bark|parler|t2v|i2v|yolo[0-9]*|sam2|davinci-002|babbage-002|text-(?:davinci|curie|babbage|ada)-00[0-9])"
    r"(?![a-z])|^(?:davinci|curie|babbage|ada)$|turbo-instruct"
)
#: what is said of models that do
_CHAT_WORDS = re.compile(
    r"chat|complet|generatecontent|^generate$|text[- ]generation|conversation|^text$|^llm$|^vlm$"
    r"|^image-text-to-text$|responses"
)
#: keys of objects that are no model
_NO_IDS = frozenset(("error", "detail", "meta", "metadata", "links", "_links", "pagination", "message"))
_LISTS = (
    *("data", "models", "result", "results", "items", "model_list", "available_models", "body", "response"),
)
_IDS = ("id", "model", "name", "slug", "model_name", "model_id", "modelId")
#: where it stands what a model is: texts, lists of texts, or objects with more of these
_KINDS = (
    *("type", "task", "tasks", "task_type", "pipeline_tag", "mode", "capability", "capabilities", "object"),
    *("model_type", "purpose", "endpoint", "endpoints", "supported_endpoints", "supportedGenerationMethods"),
    *("supported_generation_methods", "output_modalities", "modality", "family", "tags"),
)
_DETAILS = ("architecture", "details", "model_info", "capabilities", "task")
_OFF_STATES = frozenset(
    ("disabled", "offline", "unavailable", "deprecated", "retired", "archived", "error", "failed")
)
_CONTEXT_KEYS = ("max_model_len", "context_length", "context_window", "max_context_length", "n_ctx")


@dataclass(frozen=True)
class ListedModel:
    """A model that an endpoint serves. `context_tokens` is None where the list does not say."""

    id: str
    context_tokens: int | None = None


def first_chat_model(body: bytes) -> ListedModel:
    """The first listed model that can chat, as far as names and types tell.

    Takes `{"data": […]}`, `{"models": […]}` and other wrappers, a bare list, or models by their id. Raises
    CloudProtocolError.
    """
    try:
        value = parse_json(body)
    except ValueError as error:
        raise CloudProtocolError(f"not a model list: {error}") from error
    if isinstance(value, dict) and value.get("error"):
        raise CloudProtocolError(f"no model list{fault_of(value).shown}")
    listed = False
    for name, item in islice(_entries(_items(value, 0)), _MAX_LISTED):
        listed = True
        if not _OTHER_WORDS.search(name.lower()) and _may_chat(item):
            return ListedModel(name, _context_tokens(item))
    raise CloudProtocolError("lists no model that can chat" if listed else "lists no model")


def _items(value: Any, depth: int) -> Any:
    """The list, or the object by ids, inside of what was sent."""
    if not isinstance(value, dict) or depth > _MAX_DEPTH:
        return value
    found = [value[key] for key in _LISTS if isinstance(value.get(key), (list, dict))]
    if found:
        return _items(next((item for item in found if item), found[0]), depth + 1)
    if value.get("object") == "model":
        return [value]
    return {name: item for name, item in value.items() if isinstance(item, dict) and name not in _NO_IDS}


def _entries(items: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(id, what is said of it) of each model."""
    for key, item in _pairs(items):
        if isinstance(item, str):
            name, said = item, dict[str, Any]()
        elif isinstance(item, dict) and not item.get("error"):
            named = [item.get(field) for field in _IDS]
            name, said = str(next((text for text in named if _is_id(text)), key or "")), item
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


def _may_chat(item: Mapping[str, Any]) -> bool:
    """Whether nothing that is said of a model speaks against it."""
    if any(item.get(key) is False for key in ("active", "available", "enabled")):
        return False
    if any(item.get(key) is True for key in ("archived", "disabled", "deprecated")):
        return False
    if str(item.get("status")).lower() in _OFF_STATES:
        return False
    details = [item, *(item[key] for key in _DETAILS if isinstance(item.get(key), dict))]
    if isinstance(task := item.get("task"), dict):
        details.append({"task": task.get("name")})
    return all(_kinds_may_chat(part) for part in details)


def _kinds_may_chat(part: Mapping[str, Any]) -> bool:
    flags = {key.lower(): value for key, value in part.items() if isinstance(value, bool)}
    chats = [value for key, value in flags.items() if _CHAT_WORDS.search(key)]
    if chats and not any(chats):
        return False
    if not any(chats) and any(
        value and _OTHER_WORDS.search(key.removeprefix("is_")) for key, value in flags.items()
    ):
        return False
    for key in _KINDS:
        said = part.get(key)
        words = [
            word.lower() for word in (said if isinstance(said, list) else [said]) if isinstance(word, str)
        ]
        words = [word.rpartition("->")[2] for word in words]
        if any(_OTHER_WORDS.search(word) for word in words) and not any(map(_CHAT_WORDS.search, words)):
            return False
    return True


def _context_tokens(item: Mapping[str, Any]) -> int | None:
    for count in (item.get(field) for field in _CONTEXT_KEYS):
        if isinstance(count, int) and not isinstance(count, bool) and 0 < count < _MAX_CONTEXT_TOKENS:
            return count
    return None
