"""The endpoint's URL with a query: kept on every request, shown nowhere."""

from __future__ import annotations

import json

import pytest
from support.hostile_cloud import GOOD, scripted_cloud, status

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.cloud.endpoint import parse_endpoint
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.errors import CloudError, CloudUnavailableError, InputError

REQUEST = ChatRequest(({"role": "user", "content": "hi"},))


@pytest.mark.parametrize(
    ("given", "shown", "target"),
    [
        ("https://h/v1?api-version=2024-10-21", "https://h/v1", "/v1/models?api-version=2024-10-21"),
        ("https://h?a=1", "https://h", "/models?a=1"),
        ("https://h/v1/?a=1", "https://h/v1", "/v1/models?a=1"),
        ("https://h/v1/chat/completions?a=1&b=%2F", "https://h/v1", "/v1/models?a=1&b=%2F"),
        ("https://h/d/a%2Fb/?x", "https://h/d/a%2Fb", "/d/a%2Fb/models?x"),
        ("https://h/v1/v1?", "https://h/v1", "/v1/models"),
        ("https://h:8443/v1?a=/models", "https://h:8443/v1", "/v1/models?a=/models"),
        ("http://[::1]:80/v1?a=b c", "http://[::1]/v1", "/v1/models?a=b%20c"),
    ],
)
def test_the_query_goes_with_every_path(given: str, shown: str, target: str) -> None:
    """Paths are trimmed and added to in front of the query; what is shown has none."""
    endpoint = parse_endpoint(given)
    assert (endpoint.shown, endpoint.target("/models").raw_path.decode()) == (shown, target)


def test_both_requests_have_it() -> None:
    """The question for the model, and the question itself."""
    listed = status(200, body=b'{"data": [{"id": "a"}]}')
    with scripted_cloud(lambda head, _: listed if head.startswith(b"GET") else GOOD) as server:
        client = OpenAIModel(CloudOptions(server.url + "?api-version=2024-10-21&tenant=t1"))
        assert client.submit(REQUEST).result().text == "Hello"
        client.close()
        assert [request.split(b" ")[1] for request in server.requests] == [
            b"/v1/models?api-version=2024-10-21&tenant=t1",
            b"/v1/chat/completions?api-version=2024-10-21&tenant=t1",
        ]


@pytest.mark.parametrize("code", [400, 404, 302, 500])
def test_what_a_query_hides_is_not_shown(code: int) -> None:
    """An endpoint that echoes the request shows no secret of it; a version may be spoken of."""
    secrets = {"key": "hunter2", "code": "abcdefgh", "subscription": "4f9d6c2a77", "x": "pass%20word%2F9"}
    query = "&".join(f"{name}={value}" for name, value in secrets.items())

    def echo(head: bytes, _body: bytes) -> bytes:
        said = head.split(b" ")[1].decode() + " pass word/9: api-version 2024-10-21 is not supported"
        reply = json.dumps({"error": {"message": said}}).encode()
        return status(code, f"Location: http://h{head.split(b' ')[1].decode()}\r\n", reply)

    with scripted_cloud(echo) as server:
        client = OpenAIModel(CloudOptions(f"{server.url}?api-version=2024-10-21&{query}", "m"))
        with pytest.raises(CloudError) as caught:
            client.submit(REQUEST).result()
        client.close()
    shown, error = "", caught.value
    while error is not None:
        shown, error = shown + str(error), error.__cause__ or error.__context__
    assert "2024-10-21 is not supported" in shown or code == 302
    for secret in (*secrets.values(), "pass word/9"):
        assert secret not in shown


def test_a_secret_query_is_not_sent_in_clear() -> None:
    """As with a key: over http only to this machine."""
    client = OpenAIModel(CloudOptions("http://192.0.2.1/v1?key=hunter2", "m"))
    with pytest.raises(CloudUnavailableError, match="unencrypted") as caught:
        client.submit(REQUEST).result()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://h/v1#part",
        "https://u:hunter2@h/v1?a=1",
        "https://h/v1?" + "a" * 5000,
        "https://xn--\u00e4/v1",
        "https://a\u2024\u2024b/v1",
        "https://h:99999999999999999999/v1",
        "https://\u0000/v1",
        "https://[::1%25eth0/v1",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    """One line that says so, whatever the host looks like."""
    with pytest.raises(InputError, match="cloud URL") as caught:
        parse_endpoint(url)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
