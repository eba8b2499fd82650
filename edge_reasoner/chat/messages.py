"""Chat messages: text out of them, and a chat out of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from edge_reasoner.contract.template.render import Message
from edge_reasoner.errors import InputError, shown

#: where messages carry what was thought before an answer; the first is the one written here
THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")
#: texts that an endpoint is sent beside role and content
_SENT_TEXTS = ("name", "tool_call_id")


def message_text(message: Message) -> str:
    """The text of a message: its content, or the text parts of it. Raises InputError."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise InputError(
        f"message of role {message.get('role')!r}: content must be a string or a list of text parts"
    )


def sent_message(message: Message) -> Message:
    """What an endpoint is sent of a message: the fields that are known, its text parts joined. Nothing else
    leaves: no thinking, no images, no fields of a caller's own. Raises InputError."""
    sent = {"role": message.get("role"), "content": message_text(message)}
    for name in _SENT_TEXTS:
        if isinstance(text := message.get(name), str):
            sent[name] = text
    calls = message.get("tool_calls")
    if isinstance(calls, (list, tuple)) and calls:
        sent["tool_calls"] = [_sent_call(call) for call in calls]
    return sent


def _sent_call(call: object) -> dict[str, object]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(name, str) or not isinstance(arguments, str):
        raise InputError("tool_calls: each needs a function with a name and its arguments as a text")
    given = {"id": call.get("id"), "type": call.get("type", "function")}
    plain = {key: value for key, value in given.items() if isinstance(value, str)}
    return plain | {"function": {"name": name, "arguments": arguments}}


def said(answer: str, thinking: str | None) -> Message:
    """An answer as a message of the chat, its thinking beside its content for templates that ask for it."""
    message = {"role": "assistant", "content": answer}
    return message if thinking is None else message | {THINKING_FIELDS[0]: thinking}


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """A chat from a prompt: one user message, or the messages given, their text parts joined. Raises
    InputError."""
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("the prompt is empty")
        return [{"role": "user", "content": prompt}]
    given = list(prompt) if isinstance(prompt, Sequence) else [None]
    messages = [dict(message) for message in given if isinstance(message, Mapping)]
    if len(messages) != len(given):
        raise InputError("a prompt is a text, or a list of messages, each with a role and a content")
    if not messages:
        raise InputError("messages: at least one is needed")
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise InputError("messages: each needs a role (system, user, assistant or tool) and a content")
        for name, value in message.items():
            if not isinstance(name, str) or not (
                isinstance(value, str) or name == "content" or _is_json(value)
            ):
                raise InputError(f"messages: {shown(name)} is {shown(value)}; only what JSON has can be sent")
    # one string each: what the owner's rules have read is what is sent
    return [{**message, "content": message_text(message)} for message in messages]
