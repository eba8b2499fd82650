"""System messages reach endpoints that take none."""

from __future__ import annotations

import json

import pytest
from support.hostile_cloud import GOOD, scripted_cloud, status

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.cloud.roles import RoleDialect
from edge_reasoner.errors import CloudProtocolError

CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("Unsupported value: 'messages[0].role' does not support 'system' with this model.", 400),
        ("System role not supported", 400),
        ("Developer instruction is not enabled for models/gemma-3-27b-it", 400),
        ("Conversation roles must alternate user/assistant/user/assistant/...", 400),
        ("Value is not callable: null at row 1: System role not supported", 500),
        ("unknown role: system", 422),
    ],
)
def test_a_system_message_is_put_into_the_users(said: str, code: int) -> None:
    """Its text comes before the user's first words; the next request begins with that."""

    def reply(head: bytes, body: bytes) -> bytes:
        refusal = json.dumps({"error": {"message": said, "param": "messages[0].role"}}).encode()
        roles = {message["role"] for message in json.loads(body)["messages"]}
        return status(code, body=refusal) if "system" in roles else GOOD

    with scripted_cloud(reply) as server:
        model = OpenAIModel(CloudOptions(server.url, model="m"))
        for _ in range(2):
            assert model.submit(ChatRequest(CHAT)).result().text == "Hello"
        model.close()
        sent = [post["messages"] for post in server.posts]
    merged = [{"role": "user", "content": "Be brief.\n\nhi"}, *CHAT[2:]]
    assert sent == [list(CHAT), merged, merged]


def test_the_other_name_is_tried_where_it_is_named() -> None:
    """An endpoint that asks for `developer` gets it; one that refuses both gets the text in the user's."""
    roles = RoleDialect()
    assert roles.repair("'system' is not supported; use 'developer' instead", CHAT)
    assert [message["role"] for message in roles.apply(CHAT)] == ["developer", "user", "assistant", "user"]
    assert roles.repair("'developer' is not supported", roles.apply(CHAT))
    assert [message["role"] for message in roles.apply(CHAT)] == ["user", "assistant", "user"]
    assert not roles.repair("System role not supported", roles.apply(CHAT))


def test_parts_and_lone_messages_keep_their_text() -> None:
    """Contents in parts are joined as parts; instructions that nobody follows become the user's."""
    roles = RoleDialect()
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    chat = [CHAT[0], {"role": "user", "content": [picture]}, {"role": "developer", "content": "Now."}]
    assert roles.apply(chat) == chat
    assert roles.repair("System role not supported", chat)
    text = {"type": "text", "text": "Be brief."}
    assert roles.apply(chat) == [
        {"role": "user", "content": [text, picture]},
        {"role": "user", "content": "Now."},
    ]
    assert chat[0] == CHAT[0]


@pytest.mark.parametrize("said", ["the system is overloaded", "no such file system", "bad message"])
def test_other_refusals_are_not_about_roles(said: str) -> None:
    """Words about a system are no refusal of its role."""
    body = json.dumps({"error": {"message": said}}).encode()
    with scripted_cloud(lambda head, _: status(400, body=body)) as server:
        model = OpenAIModel(CloudOptions(server.url, model="m"))
        with pytest.raises(CloudProtocolError, match=said):
            model.submit(ChatRequest(CHAT)).result()
        model.close()
        assert len(server.posts) == 1
