"""Chat messages: text out of them, and a chat out of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_reasoner.contract.template.render import Message
from edge_reasoner.errors import InputError

#: where messages carry what was thought before an answer; the first is the one written here
THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")


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


def sent_text(message: Message) -> str:
    """All that an endpoint would read of a message: its text, and every other field but thinking. Raises
    InputError."""
    ours = ("role", "content", *THINKING_FIELDS)
    others = [str(value) for name, value in message.items() if name not in ours]
    return "\n".join([message_text(message), *others])


def said(answer: str, thinking: str | None) -> Message:
    """An answer as a message of the chat, its thinking beside its content for templates that ask for it."""
    message = {"role": "assistant", "content": answer}
    return message if thinking is None else message | {THINKING_FIELDS[0]: thinking}


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
    # one string each: what the owner's rules have read is what is sent
    return [{**message, "content": message_text(message)} for message in messages]
