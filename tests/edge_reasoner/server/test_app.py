"""The OpenAI protocol, spoken by the real `openai` client and by hostile raw requests."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from support.http_requests import post
from support.local_models import scripted_model

from edge_reasoner.chat.model import Cancellation, PulledStream
from edge_reasoner.client import InferenceClient
from edge_reasoner.cloud.base import CloudResult
from edge_reasoner.errors import BackendError, CloudError, InputError
from edge_reasoner.server.protocol import MAX_REQUEST_BYTES
from edge_reasoner.server.reference import ReferenceModel, serve, serving

ANSWERS = {
    "capital": "Paris is größer 你好 😀.",
    "longer": "the quick brown fox jumps " * 6,
    "riddle": "<think>\nthe fox rests\n</think>\n\nthe dog",
    "endless": "<think>the fox " + "jumps " * 9,
}
ASK = [{"role": "user", "content": "What is the capital?"}]
JSON = {"Content-Type": "application/json"}
BODY = {"model": "tiny", "messages": ASK, "temperature": 0}


class SlowModel:
    """A twentieth of a second per piece, without end; counts what runs, and fails on demand."""

    name, context_tokens = "slow", 256

    def __init__(self) -> None:
        self.started = self.ended = self.pieces = 0

    def submit(self, request):
        cancellation = Cancellation()
        return PulledStream(self._pieces(request, cancellation), cancellation)

    def _pieces(self, request, cancellation):
        self.started += 1
        try:
            while not cancellation.wanted:
                time.sleep(0.05)
                self.pieces += 1
                yield "x "
                if request.text == "fail":
                    raise BackendError("secret details")
            return CloudResult("", None, "slow", "cancelled", None)
        finally:
            self.ended += 1

    def close(self):
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A served scripted model."""
    with serving(ReferenceModel(scripted_model(ANSWERS, context_tokens=256))) as base:
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    """The real client."""
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    """The one model is listed and found by name; another is 404."""
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "edge-reasoner"
    with pytest.raises(openai.NotFoundError, match="'tiny' is"):
        client.models.retrieve("gpt-4")


def test_chat(client: openai.OpenAI) -> None:
    """A whole reply: text, finish reason, token counts, log-probabilities."""
    reply = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, logprobs=True)
    assert reply.choices[0].message.content == ANSWERS["capital"]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 0
    logprobs = reply.choices[0].logprobs.content
    assert "".join(t.token for t in logprobs) == ANSWERS["capital"] and all(t.logprob <= 0 for t in logprobs)


def test_chat_stream(client: openai.OpenAI) -> None:
    """Streamed pieces add up to the same text; the last chunk counts the tokens."""
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == ANSWERS["capital"]
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 3


def test_thinking_has_a_field_of_its_own(client: openai.OpenAI) -> None:
    """`reasoning_content`, whole and streamed; never in the content or its log-probabilities; and a client
    may send the message back as it is."""
    ask = [{"role": "user", "content": "a riddle"}]
    reply = client.chat.completions.create(model="tiny", messages=ask, temperature=0, logprobs=True)
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content) == ("the dog", "the fox rests")
    assert "".join(t.token for t in reply.choices[0].logprobs.content) == "the dog"
    chunks = list(client.chat.completions.create(model="tiny", messages=ask, temperature=0, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "the dog"
    told = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(told) == "the fox rests" and sum(map(bool, told)) > 2
    again = [*ask, message.model_dump(exclude_none=True), {"role": "user", "content": "the capital?"}]
    reply = client.chat.completions.create(model="tiny", messages=again, temperature=0)
    assert reply.choices[0].message.content == ANSWERS["capital"]
    assert "reasoning_content" not in reply.choices[0].message.model_dump()


def test_thinking_without_end(client: openai.OpenAI) -> None:
    """A block that never closes leaves the content empty."""
    ask = [{"role": "user", "content": "endless"}]
    reply = client.chat.completions.create(model="tiny", messages=ask, temperature=0, max_tokens=12)
    assert reply.choices[0].message.content == "" and reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.reasoning_content.startswith("the fox")


def test_stop_length_and_parts(client: openai.OpenAI) -> None:
    """stop and max_tokens end the answer; content may be text parts; developer counts as system."""
    parts = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is the "}, {"type": "text", "text": "capital?"}],
        },
    ]
    reply = client.chat.completions.create(model="tiny", messages=parts, temperature=0, stop=["größer"])
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("Paris is ", "stop")
    reply = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_tokens=2)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 2


def test_completions(client: openai.OpenAI) -> None:
    """The text endpoint continues a raw prompt, whole and streamed."""
    prompt = "user:capital<|im_end|>assistant:"
    reply = client.completions.create(model="tiny", prompt=prompt, temperature=0)
    assert reply.choices[0].text == ANSWERS["capital"]
    chunks = client.completions.create(model="tiny", prompt=prompt, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == ANSWERS["capital"]


def test_inference_client_against_the_service(url: str) -> None:
    """Requirements row G7's call works as written; unknown parameters are refused with the allowed ones."""
    with InferenceClient(api_key="k", model_name="tiny", endpoint=url) as client:
        parameters = {"temperature": 0.0, "max_tokens": 64, "attention_window": 200}
        reply = client.infer(prompt="What is the capital?", parameters=parameters)
        assert reply.choices[0].text == ANSWERS["capital"] and reply.source == "cloud"
        riddle = client.infer(prompt="a riddle", parameters={"temperature": 0.0}).choices[0]
        assert (riddle.text, riddle.thinking) == ("the dog", "the fox rests")
        with pytest.raises(InputError, match=r"'heat'.*temperature.*attention_window"):
            client.infer(prompt="x", parameters={"heat": 1})
        with pytest.raises(InputError, match="attention_window"):
            client.infer(prompt="x", parameters={"attention_window": "all"})
        with pytest.raises(CloudError, match="fit a context of 8 tokens"):
            client.infer(prompt="What is the capital?", parameters={"attention_window": 8})


@pytest.mark.parametrize(
    "options",
    [{}, {"model_name": "no-such-bundle"}, {"endpoint": "/no/such/bundle"}, {"endpoint": "x" * 5000}],
)
def test_inference_client_needs_a_place(options: dict) -> None:
    """Neither a URL nor an existing directory: one clear line."""
    with pytest.raises(InputError, match="InferenceClient"):
        InferenceClient(**options)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"messages": [{"role": "user"}]}, "content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "image_url"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, ""),
        ({"n": 2}, "n"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"seed": -1}, "seed"),
        ({"attention_window": 0}, "attention_window"),
        ({"tools": []}, "tools"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"stream": "yes"}, "stream"),
        ({"model": 7}, "model"),
        ({"messages": [{"role": "user", "content": "the quick brown fox " * 200}]}, "fit a context"),
        ({"messages": [{"role": "user", "content": "x"}] * 3000}, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(url: str, change: dict, says: str, stream: bool) -> None:
    """Each malformed field is a 400 with the protocol's error body, naming it, streamed or not."""
    reply = httpx.post(f"{url}/chat/completions", json={**BODY, "stream": stream, **change})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error"
    assert says in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": "tiny", "messages"' + b" " * 1000],
)
def test_garbage_bodies(url: str, data: bytes) -> None:
    """Bodies that are no request are 400, and the service goes on."""
    reply = httpx.post(f"{url}/chat/completions", content=data, headers=JSON)
    assert reply.status_code == 400 and "error" in reply.json()
    assert httpx.get(url.removesuffix("v1") + "healthz").json()["status"] == "ok"


def test_other_refusals(url: str) -> None:
    """Wrong paths, methods and models, and bodies beyond the bound, get their own status."""
    assert httpx.get(f"{url}/chat/completions").status_code == 405
    assert httpx.get(f"{url}/nothing").json()["error"]["code"] == 404
    assert httpx.post(f"{url}/chat/completions", json={**BODY, "model": "gpt-4"}).status_code == 404
    big = b'{"x": "' + b"a" * MAX_REQUEST_BYTES + b'"}'
    assert httpx.post(f"{url}/chat/completions", content=big, headers=JSON).status_code == 413
    chunked = (b"a" * 65536 for _ in range(MAX_REQUEST_BYTES // 65536 + 2))
    assert httpx.post(f"{url}/chat/completions", content=chunked, headers=JSON).status_code == 413


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00garbage",
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999\r\n\r\n{",
    ],
)
def test_raw_garbage_leaves_the_service_up(url: str, raw: bytes) -> None:
    """Bytes that are not HTTP, or a request cut short, do no harm to the next client."""
    port = int(url.rsplit(":", 1)[1].removesuffix("/v1"))
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(raw)
    assert httpx.get(f"{url}/models").status_code == 200


def test_bearer_token() -> None:
    """With a token set, /v1 refuses without it; the health check stays open."""
    with serving(ReferenceModel(scripted_model(ANSWERS)), auth_token="geheim-ß") as base:
        assert httpx.get(f"{base}/models").status_code == 401
        assert httpx.get(f"{base}/models", headers={"Authorization": "Bearer x"}).status_code == 401
        good = {"Authorization": "Bearer geheim-ß".encode()}
        assert httpx.get(f"{base}/models", headers=good).status_code == 200
        assert httpx.get(base.removesuffix("v1") + "healthz").status_code == 200


def _wait(condition, seconds: float = 60.0) -> bool:
    """Whether the condition comes true; the time is a bound for a hang, not a measure."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and not condition():
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels(stream: bool) -> None:
    """A client that goes away ends its generation: the model is free again within a moment."""
    model = SlowModel()
    with serving(model) as base:
        body = json.dumps({**BODY, "model": "slow", "stream": stream}).encode()
        port = int(base.rsplit(":", 1)[1].removesuffix("/v1"))
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(post("/v1/chat/completions", body))
            assert _wait(lambda: model.started == 1)
            assert _wait(lambda: model.pieces > 2) and model.ended == 0
        assert _wait(lambda: model.ended == 1)


def test_full_queue_is_429() -> None:
    """Beyond the running job and the allowed waiting ones, requests get 429 with Retry-After."""
    model = SlowModel()
    with serving(model, max_waiting=1) as base:
        body = {**BODY, "model": "slow", "stream": True}
        replies: list[int] = []
        done = threading.Event()

        def hold() -> None:
            with httpx.stream("POST", f"{base}/chat/completions", json=body, timeout=20) as reply:
                replies.append(reply.status_code)
                chunks = reply.iter_bytes()  # dropping the iterator would close the connection
                next(chunks)
                done.wait(20)

        threads = [threading.Thread(target=hold) for _ in range(2)]
        [thread.start() for thread in threads]
        try:
            assert _wait(lambda: model.started == 2)
            reply = httpx.post(f"{base}/chat/completions", json=body, timeout=10)
            assert reply.status_code == 429 and int(reply.headers["retry-after"]) > 0
        finally:
            done.set()
            [thread.join(20) for thread in threads]
        assert replies == [200, 200]


def test_closing_ends_what_is_under_way() -> None:
    """A service that is shut down cancels its answers; none keeps the process alive."""
    model = SlowModel()
    with serving(model) as base:
        body = {**BODY, "model": "slow", "stream": True}
        with httpx.stream("POST", f"{base}/chat/completions", json=body, timeout=20) as reply:
            next(reply.iter_bytes())
    assert _wait(lambda: model.started == model.ended == 1)


def test_model_failure_is_500_without_details() -> None:
    """A backend failure is a 500, or an error event in mid-stream; the client learns no details."""
    model = SlowModel()
    with serving(model) as base:
        body = {"model": "slow", "prompt": "fail"}
        reply = httpx.post(f"{base}/completions", json=body)
        assert reply.status_code == 500 and "secret" not in reply.text
        streamed = httpx.post(f"{base}/completions", json={**body, "stream": True}).text
        assert "the model failed" in streamed and "secret" not in streamed and "[DONE]" not in streamed


def test_port_in_use_is_one_clear_line() -> None:
    """Serving on a taken or impossible port is an InputError."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot listen"):
        serve(ReferenceModel(scripted_model(ANSWERS)), port=taken.getsockname()[1])
    with pytest.raises(InputError, match="65535"):
        serve(ReferenceModel(scripted_model(ANSWERS)), port=70_000)


NULLS = (
    "tools",
    "tool_choice",
    "logit_bias",
    "response_format",
    "stream",
    "n",
    "max_tokens",
    "audio",
    "seed",
)


@pytest.mark.parametrize("name", NULLS)
def test_null_is_as_if_not_there(url: str, name: str) -> None:
    """Clients send null for what they do not set; the answer is that of the request without it."""
    plain = httpx.post(f"{url}/chat/completions", json=BODY).json()
    reply = httpx.post(f"{url}/chat/completions", json={**BODY, name: None})
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == plain["choices"]


def test_nulls_within_a_request(url: str) -> None:
    """The same in messages and their parts; a null that an item of a list is, or the messages are, is not."""
    unset = {"tool_calls": None, "tool_call_id": None, "function_call": None, "audio": None, "name": None}
    part = {"type": "text", "text": "What is the capital?", "cache_control": None}
    messages = [
        {**ASK[0], **unset},
        {"role": "assistant", "content": "x", **unset},
        {**ASK[0], "content": [part]},
    ]
    reply = httpx.post(f"{url}/chat/completions", json={**BODY, "messages": messages})
    assert reply.status_code == 200, reply.text
    for change in ({"messages": None}, {"messages": [None]}, {"stop": [None]}, {"tools": [None]}):
        assert httpx.post(f"{url}/chat/completions", json={**BODY, **change}).status_code == 400
