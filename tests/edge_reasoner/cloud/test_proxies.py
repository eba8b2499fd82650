"""Proxies, certificates and keys: decided here, and never in the way of a device that can answer itself."""

from __future__ import annotations

import socket

import pytest
from support.hostile_cloud import GOOD, hostile_cloud, scripted_cloud, send, status

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.cloud.proxies import is_loopback, proxy_for
from edge_reasoner.errors import CloudUnavailableError, EdgeReasonerError

KEY = {"OPENAI_API_KEY": "sk-not-a-real-key"}


@pytest.mark.parametrize(
    ("host", "local"),
    {
        **dict.fromkeys(
            ("localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "127.1", "::1"), True
        ),
        **dict.fromkeys(("[::1]", "0.0.0.0", "::", "::ffff:127.0.0.1", "0x7f000001", "2130706433"), True),
        **dict.fromkeys(
            ("localhost.example", "nolocalhost", "10.0.0.1", "::ffff:10.0.0.1", "128.0.0.1"), False
        ),
        **dict.fromkeys(("127.0.0.1.example", "", "²", "fe80::1%eth0"), False),
    }.items(),
)
def test_what_is_this_machine(host: str, local: bool) -> None:
    """Names and addresses of loopback in every spelling that resolvers take; not what only looks like it."""
    assert is_loopback(host) is local


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"https_proxy": "http://p:1"}, ("https_proxy", "http://p:1")),
        ({"HTTPS_PROXY": "p:1"}, ("HTTPS_PROXY", "http://p:1")),
        ({"http_proxy": "http://p:1"}, None),
        ({"HTTP_PROXY": "http://p:1"}, None),
        ({"all_proxy": "http://a:1"}, ("all_proxy", "http://a:1")),
        ({"ALL_PROXY": "http://a:1", "https_proxy": "http://p:1"}, ("https_proxy", "http://p:1")),
        ({"https_proxy": " ", "all_proxy": ""}, None),
        *(
            ({"https_proxy": "http://p:1", "no_proxy": value}, None)
            for value in (
                "*",
                "a.example",
                "example",
                ".example",
                "*.example",
                "x, a.example:443",
                "x a.example",
            )
        ),
        *(
            ({"https_proxy": "http://p:1", "NO_PROXY": value}, ("https_proxy", "http://p:1"))
            for value in (
                "",
                "b.example",
                "xample",
                "a.example:80",
                "10.0.0.0/8",
                "[::1]",
                "fd07::/64",
                "²:²",
                "/",
            )
        ),
    ],
)
def test_environment_names_the_proxy(environment, expected) -> None:
    """The usual variables, for https://a.example; odd entries of no_proxy are no reason to fail."""
    assert proxy_for("https", "a.example", 443, environment) == expected


@pytest.mark.parametrize("excluded", ["192.0.2.7", "192.0.2.0/24", "192.0.2.7:443", "fd07::/64,192.0.0.0/8"])
def test_no_proxy_takes_addresses_and_networks(excluded: str) -> None:
    """An address is excluded by itself, with its port, or by its network."""
    environment = {"https_proxy": "http://p:1", "no_proxy": excluded}
    assert proxy_for("https", "192.0.2.7", 443, environment) is None
    assert proxy_for("https", "198.51.100.1", 443, environment) is not None
    environment["no_proxy"] = "fd07::/64"
    assert proxy_for("https", "fd07::5", 443, environment) is None


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "api.localhost", "127.1"])
def test_loopback_is_asked_directly(ask, variable: str, host: str) -> None:
    """A cloud on this machine gets the key; a proxy sees nothing."""
    with hostile_cloud(send(GOOD)) as server, hostile_cloud(send(status(502))) as proxy:
        url = server.url.replace("127.0.0.1", host)
        assert ask(url, environment={variable: proxy.url.removesuffix("/v1"), **KEY}).text == "Hello"
        assert b"Bearer sk-not-a-real-key" in server.requests[0] and not proxy.requests


def test_https_goes_through_a_tunnel(ask) -> None:
    """A proxy is asked for a tunnel and never sees the key; its refusal is an error of the cloud."""
    with hostile_cloud(send(status(403))) as proxy:
        place = proxy.url.removesuffix("/v1").replace("http://", "http://user:hunter2pass@")
        with pytest.raises(CloudUnavailableError, match="proxy refused") as caught:
            ask("https://cloud.example/v1", environment={"https_proxy": place, **KEY})
        assert proxy.requests[0].startswith(b"CONNECT cloud.example:443 ")
        assert not any(b"sk-not" in request for request in proxy.requests)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"])
def test_no_proxy_reads_what_is_not_encrypted(ask, variable: str) -> None:
    """A plain http cloud is asked directly: a proxy gets neither prompt nor answer. With a key nothing
    is sent at all."""
    with hostile_cloud(send(GOOD)) as proxy:
        environment = {variable: proxy.url.removesuffix("/v1")}
        with pytest.raises(CloudUnavailableError):
            # a name that leads nowhere: only a proxy could have answered
            ask("http://cloud.invalid/v1", environment=environment)
        with pytest.raises(CloudUnavailableError, match="unencrypted"):
            ask("http://cloud.invalid/v1", environment=environment | KEY)
        assert not proxy.requests


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "ALL_PROXY"),
        ({"all_proxy": "socks://u:hunter2pass@127.0.0.1:9/"}, "all_proxy=socks://127.0.0.1:9/"),
        ({"https_proxy": "://"}, "https_proxy"),
        ({"https_proxy": "http://[::1"}, "https_proxy"),
        ({"https_proxy": "http://h:port"}, "https_proxy"),
        ({"SSL_CERT_FILE": "/nonexistent/ca.pem"}, "SSL_CERT_FILE=/nonexistent/ca.pem"),
        ({"SSL_CERT_FILE": __file__}, "SSL_CERT_FILE"),
        ({"OPENAI_API_KEY": "sk-two words-of-a-key"}, "not an API key"),
        ({"OPENAI_API_KEY": "sk-zwölf-of-a-key"}, "not an API key"),
    ],
)
def test_an_odd_environment_is_an_error_of_the_cloud(ask, environment, said) -> None:
    """The client is made whatever the environment says; its first answer tells what is wrong, in one line."""
    connect(CloudOptions("https://192.0.2.1/v1", environment=environment)).close()
    with pytest.raises(CloudUnavailableError) as caught:
        ask("https://192.0.2.1/v1", environment=environment)
    text = str(caught.value)
    assert said in text and "\n" not in text
    assert not any(secret in text for secret in ("hunter2", "of-a-key"))


def test_odd_environment_does_not_matter_on_loopback(ask) -> None:
    """What a loopback cloud does not need is not looked at. Space around a key is not part of it."""
    odd = {
        "SSL_CERT_FILE": "/nonexistent",
        "SSLKEYLOGFILE": "/nonexistent/x",
        "all_proxy": "socks://h",
        "no_proxy": "²",
    }
    with hostile_cloud(send(GOOD)) as server:
        assert ask(server.url, environment=odd | {"OPENAI_API_KEY": " sk-key-with-space \n"}).text == "Hello"
        assert b"Bearer sk-key-with-space\r\n" in server.requests[0]


def test_redirects_and_cookies_are_not_followed(ask) -> None:
    """A redirect is an error that shows where to, and nothing is sent there; cookies do not come back."""
    with hostile_cloud(send(GOOD)) as other:
        moved = status(307, f"Location: {other.url}/chat/completions?k=1\r\n")
        with (
            hostile_cloud(send(moved)) as server,
            pytest.raises(Exception, match=f"not followed; it points to {other.url}/chat/completions$"),
        ):
            ask(server.url, environment=KEY)
        assert not other.requests
    baked = GOOD.replace(b"Connection:", b"Set-Cookie: id=device7; Path=/\r\nConnection:")
    with scripted_cloud(lambda head, body: baked) as server:
        client = connect(CloudOptions(server.url, model="m"))
        for _ in range(2):
            client.submit(ChatRequest(({"role": "user", "content": "hi"},))).result()
        client.close()
        assert len(server.requests) == 2 and not any(b"device7" in request for request in server.requests)


@pytest.mark.parametrize("host", ["a" * 70, "a..b", "x" * 300, "[fe80::1%nosuch]"])
def test_hosts_that_no_resolver_takes(ask, host: str) -> None:
    """Such a name is an error of the cloud, or is refused as a URL; nothing else escapes."""
    with pytest.raises(EdgeReasonerError):
        ask(f"http://{host}/v1")


def test_a_closed_client_says_so(ask) -> None:
    """Asking after close is an error of the cloud."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        client = connect(CloudOptions(f"http://127.0.0.1:{probe.getsockname()[1]}/v1", model="m"))
        client.close()
        client.close()
        with pytest.raises(CloudUnavailableError, match="closed"):
            client.submit(ChatRequest(({"role": "user", "content": "hi"},))).result()
