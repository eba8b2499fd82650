"""Which URL, and which model: what endpoints list, and what helps when it is not there."""

from __future__ import annotations

import json

import pytest
from support.hostile_cloud import GOOD, scripted_cloud, status

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.cloud.model_list import ListedModel, first_chat_model
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.errors import CloudError, CloudProtocolError, InputError


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}, "a"),
        ({"models": [{"name": "a", "model": "a"}]}, "a"),
        ({"data": None, "models": ["a"]}, "a"),
        ({"data": {"x": {"id": "a"}}}, "a"),
        ([{"id": "a"}], "a"),
        (["a"], "a"),
        ({"a": {"object": "model"}, "b": {}}, "a"),
        ({"data": [{"id": None, "name": "a"}, 7, {"id": 5}]}, "a"),
        (
            {
                "data": [
                    {"id": "text-embedding-3-small"},
                    {"id": "bge-m3"},
                    {"id": "nomic-embed-text"},
                    {"id": "a"},
                ]
            },
            "a",
        ),
        (
            {
                "data": [
                    {"id": "whisper-1"},
                    {"id": "tts-1-hd"},
                    {"id": "omni-moderation-latest"},
                    {"id": "a"},
                ]
            },
            "a",
        ),
        (
            {
                "data": [
                    {"id": "jina-reranker-v2"},
                    {"id": "dall-e-3"},
                    {"id": "Llama-Guard-3-8B"},
                    {"id": "a"},
                ]
            },
            "a",
        ),
        (
            {"data": [{"id": "x", "type": "embeddings"}, {"id": "y", "task": "text-to-speech"}, {"id": "a"}]},
            "a",
        ),
        ({"data": [{"id": "x/gpt-oss-20b"}]}, "x/gpt-oss-20b"),
        # lists in other wrappers
        *(
            (listed, "a")
            for listed in (
                {"data": [], "models": ["a"]},
                {"data": {"data": [{"id": "a"}]}},
                {"models": {"data": [{"id": "a"}]}},
                {"result": [{"name": "a"}], "success": True},
                {"items": [{"model_name": "a"}]},
                {"results": [{"model_id": "a"}], "count": 1, "next": None},
                {"body": {"data": [{"id": "a"}]}},
                {"id": "a", "object": "model"},
                {"data": [{"id": "x", "error": "cannot be loaded"}, {"id": "a"}]},
            )
        ),
        # what an endpoint says of a model that cannot chat, and of one that can
        *(
            ({"data": [{"id": "x", **other}, {"id": "a", **chat}]}, "a")
            for other, chat in (
                (
                    {"capabilities": {"completion_chat": False, "vision": True}},
                    {"capabilities": {"completion_chat": True}},
                ),
                ({"capabilities": {"chat_completion": False, "embeddings": True}}, {}),
                ({"capabilities": ["embedding"]}, {"capabilities": ["completion", "embedding"]}),
                (
                    {"architecture": {"output_modalities": ["image"]}},
                    {"architecture": {"output_modalities": ["text"]}},
                ),
                (
                    {"architecture": {"modality": "text->image"}},
                    {"architecture": {"modality": "text+image->text"}},
                ),
                (
                    {"supportedGenerationMethods": ["embedContent"]},
                    {"supportedGenerationMethods": ["generateContent"]},
                ),
                ({"endpoints": ["embed"]}, {"endpoints": ["embed", "chat"]}),
                (
                    {"supported_endpoints": ["/v1/embeddings"]},
                    {"supported_endpoints": ["/v1/chat/completions"]},
                ),
                ({"details": {"family": "nomic-bert"}}, {"details": {"family": "llama"}}),
                ({"pipeline_tag": "feature-extraction"}, {"pipeline_tag": "text-generation"}),
                ({"model_info": {"mode": "embedding"}}, {"model_info": {"mode": "chat"}}),
                ({"task": {"name": "Text Embeddings"}}, {"task": {"name": "Text Generation"}}),
                ({"model_type": "embedding"}, {"model_type": "LLM"}),
                ({"is_embedding": True}, {"is_embedding": False}),
                ({"active": False}, {"active": True}),
                ({"deprecated": True}, {"deprecated": None}),
                ({"status": "offline"}, {"status": "running"}),
            )
        ),
        *(
            ({"data": [{"id": name}, {"id": "a"}]}, "a")
            for name in (
                *("gtr-t5-large", "voyage-3", "kokoro", "xtts-v2", "suno/bark", "parakeet-tdt", "wav2vec2"),
                *("hunyuan-video", "wan2.1-t2v", "sd3.5-large", "shieldgemma-2b", "bert-base", "paddleocr"),
                *(
                    "text-search-ada-doc-001",
                    "text-davinci-003",
                    "davinci",
                    "all-mpnet-base-v2",
                    "seedream-v4",
                ),
            )
        ),
        # names that only look like it
        *(
            ({"data": [{"id": name}]}, name)
            for name in ("starcoder-ada", "hubert-chat", "davinci-next-chat", "sdk-coder", "gemma-3", "phi-4")
        ),
        ({"data": [{"id": "mistral-saba-24b-instruct"}, {"id": "a"}]}, "mistral-saba-24b-instruct"),
    ],
)
def test_the_first_model_that_can_chat(listed, expected) -> None:
    """Every shape of list gives its first chat model."""
    assert first_chat_model(json.dumps(listed).encode()).id == expected


@pytest.mark.parametrize("key", ["max_model_len", "context_length", "context_window"])
def test_context_is_taken_where_it_is_listed(key: str) -> None:
    """The list may say how long a prompt may be."""
    body = json.dumps({"data": [{"id": "e5-base", key: 5}, {"id": "a", key: 4096}]}).encode()
    assert first_chat_model(body) == ListedModel("a", 4096)
    with scripted_cloud(
        lambda head, _: status(200, body=body) if head.startswith(b"GET") else GOOD
    ) as server:
        model = OpenAIModel(CloudOptions(server.url))
        assert (model.name, model.context_tokens) == ("", None)
        model.submit(ChatRequest(({"role": "user", "content": "hi"},))).result()
        assert (model.name, model.context_tokens) == ("a", 4096)
        model.close()


@pytest.mark.parametrize(
    "reply",
    [
        *(
            status(200, body=body)
            for body in (b"{}", b"[]", b"null", b"7", b"{", b"<html>", b'{"data": [{"id": 5}]}')
        ),
        status(200, body=b'{"error": {"message": "no list"}}'),
        status(200, body=b'{"data": [{"id": "text-embedding-3-small"}]}'),
        status(404),
        status(401),
        status(403),
        status(405),
        status(501),
        status(302, "Location: /x\r\n"),
    ],
)
def test_without_a_list_the_model_has_to_be_named(ask, reply: bytes) -> None:
    """A list that is missing, refused, empty or none says which option helps."""
    with scripted_cloud(lambda head, body: reply if head.startswith(b"GET") else GOOD) as server:
        with pytest.raises(CloudProtocolError, match="--cloud-model"):
            ask(server.url, model=None)
        assert ask(server.url, model="named").text == "Hello"


@pytest.mark.parametrize(
    "path",
    [
        "/v1",
        "/v1/",
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/v1/models",
        "/v1/chat",
        "/v1 ",
        "/v1\n",
        "/v1/v1",
        "/v1/completions",
    ],
)
def test_a_full_path_is_trimmed(ask, path: str) -> None:
    """Users paste the whole URL; the request goes to the right path."""
    with scripted_cloud(lambda head, body: GOOD) as server:
        ask(server.url.removesuffix("/v1") + path)
        assert server.requests[0].startswith(b"POST /v1/chat/completions ")


@pytest.mark.parametrize(
    ("path", "reply", "said"),
    [
        ("", status(404), "/v1$"),
        ("/api", status(405), "/api/v1$"),
        ("", status(200, body=b"<html>").replace(b"application/json", b"text/html"), "/v1$"),
        ("/v1", status(404, body=b'{"error": {"message": "no such model"}}'), "--cloud-model"),
        ("/v1", status(404, body=b'{"error": {"code": "model_not_found"}}'), "--cloud-model"),
        ("/v1", status(401), "OPENAI_API_KEY"),
    ],
)
def test_a_wrong_place_says_what_helps(ask, path: str, reply: bytes, said: str) -> None:
    """What is not found names the URL to try or the option to give."""
    with scripted_cloud(lambda head, body: reply) as server, pytest.raises(CloudError, match=said):
        ask(server.url.removesuffix("/v1") + path)


@pytest.mark.parametrize(
    "url",
    [
        "http://u:hunter2@host/v1",
        "http://u:hunter2@[::1/v1",
        "u:hunter2@host",
        "https://h/v1?key=hunter2#x",
        "//?hunter2",
    ],
)
def test_refused_urls_show_no_secret(url: str) -> None:
    """A URL that is refused is shown without what may be a password."""
    with pytest.raises(InputError, match="cloud URL") as caught:
        OpenAIModel(CloudOptions(url))
    assert "hunter2" not in str(caught.value) and caught.value.__cause__ is None
