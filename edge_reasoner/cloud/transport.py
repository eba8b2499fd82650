"""HTTP to one endpoint: the connection is made when it is first used, every fault becomes a CloudError."""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import unquote

import httpx

from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.cloud.encodings import unpacked
from edge_reasoner.cloud.proxies import is_loopback, proxy_for
from edge_reasoner.cloud.redact import Redactor, is_telling, shown_url
from edge_reasoner.cloud.retry import RetryError
from edge_reasoner.errors import CloudError, CloudUnavailableError, InputError, one_line

_ENDPOINT_PATHS = ("/chat/completions", "/completions", "/chat", "/models")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Reply:
    """The head of a reply, and its body as it arrives. Valid inside `Transport.exchange`."""

    def __init__(self, response: httpx.Response, chunks: Callable[[int], Iterator[bytes]]) -> None:
        self.status = response.status_code
        self.headers = response.headers
        #: the body, unpacked, within that many bytes
        self.chunks = chunks

    def body(self, limit_bytes: int) -> bytes:
        """The whole body. Raises CloudProtocolError beyond the limit."""
        return b"".join(self.chunks(limit_bytes))

    def start_of_body(self, limit_bytes: int) -> bytes:
        """As much of the body as comes within the limit; for what is only shown."""
        body = b""
        try:
            for chunk in self.chunks(limit_bytes):
                body += chunk
        except (CloudError, RetryError, httpx.HTTPError):
            return body
        return body


class Transport:
    """One endpoint's URL, key and connections. Thread-safe; connections are pooled."""

    def __init__(self, options: CloudOptions, clock: Callable[[], float] = time.monotonic) -> None:
        """Checks the URL's form and nothing else. Raises InputError."""
        self.url = base_url(options.url)
        self._parsed = httpx.URL(self.url)
        self._options = options
        self._limits = options.limits
        self._clock = clock
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._client: httpx.Client | None = None
        self._closed = False
        key = options.environment.get(options.api_key_env, "") if options.api_key_env else ""
        self._key = key.strip()
        #: for errors
        self.redactor = Redactor((self._key, *self._proxy_secrets()))
        #: for answers, which may well hold "none" or "placeholder" where such a word stands in for a key
        self.answer_redactor = Redactor((self._key,) if is_telling(self._key) else ())

    @contextmanager
    def exchange(self, method: str, path: str, body: bytes | None, deadline_s: float) -> Iterator[Reply]:
        """One request. Faults of the network, in it and in the reading of its reply, become RetryError."""
        limits, left_s = self._limits, deadline_s - self._clock()
        if left_s <= 0:
            raise CloudUnavailableError(f"{self.url}: no answer within {limits.total_s:g} s")
        client = self._connected()
        timeout = httpx.Timeout(min(limits.read_s, left_s), connect=min(limits.connect_s, left_s))
        headers = {"Content-Type": "application/json"} if body is not None else {}
        target = self._parsed.copy_with(path=self._parsed.path.rstrip("/") + path)
        if self._parsed.scheme == "http" and self._parsed.host.endswith(".localhost"):
            # not every resolver knows that these names are this machine
            headers["Host"] = self._parsed.netloc.decode("ascii")
            target = target.copy_with(host="127.0.0.1")
        try:
            with client.stream(method, target, content=body, headers=headers, timeout=timeout) as response:
                yield Reply(response, lambda limit: self._chunks(response, deadline_s, limit))
        except httpx.TimeoutException as error:
            what = "connection" if isinstance(error, (httpx.ConnectTimeout, httpx.PoolTimeout)) else "data"
            raise RetryError(CloudUnavailableError(f"{self.url}: timed out waiting for {what}")) from error
        except httpx.ProxyError as error:
            text = f"{self.url}: the proxy refused: {one_line(error)}"
            raise RetryError(CloudUnavailableError(text)) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # a connection closed in mid-answer arrives here too: worth another attempt
            kind = "broken reply: " if isinstance(error, httpx.RemoteProtocolError) else ""
            said = one_line(error)
            raise RetryError(CloudUnavailableError(f"{self.url}: {kind}{said}")) from error
        except (UnicodeError, OverflowError) as error:
            # a host name that no resolver takes
            raise CloudUnavailableError(f"{self.url}: not a host and port: {one_line(error)}") from error

    def close(self) -> None:
        """Closes connections. Idempotent."""
        self._leave_parents_connections()
        with self._lock:
            self._closed = True
            if self._client is not None:
                self._client.close()
                self._client = None

    def _chunks(self, response: httpx.Response, deadline_s: float, limit_bytes: int) -> Iterator[bytes]:
        encoding = response.headers.get("content-encoding", "")
        try:
            yield from unpacked(self._timed(response, deadline_s), encoding, limit_bytes)
        except CloudUnavailableError as error:
            raise RetryError(CloudUnavailableError(f"{self.url}: {error}")) from error

    def _timed(self, response: httpx.Response, deadline_s: float) -> Iterator[bytes]:
        for chunk in response.iter_raw():
            if self._clock() > deadline_s:
                raise CloudUnavailableError(f"not done within {self._limits.total_s:g} s")
            yield chunk

    def _leave_parents_connections(self) -> None:
        """In a forked child: two processes on one connection would get each other's answers, and a lock that
        a thread of the parent held would be held for ever."""
        if self._pid != os.getpid():
            self._lock, self._client, self._pid = threading.Lock(), None, os.getpid()

    def _connected(self) -> httpx.Client:
        self._leave_parents_connections()
        with self._lock:
            if self._closed:
                raise CloudUnavailableError(f"{self.url}: the client is closed")
            if self._client is None:
                self._client = self._make_client()
            return self._client

    def _make_client(self) -> httpx.Client:
        """Raises CloudUnavailableError for a key, a proxy or certificates that cannot be used."""
        # identity: a stream that is packed arrives late; packed replies are taken all the same
        headers = {"Accept-Encoding": "identity", "User-Agent": "edge-reasoner"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._checked_key()}"
        found = self._proxy()
        try:
            context = self._tls()
            proxy = None
            if found is not None:
                secure = found[1].lower().startswith("https:")
                proxy = httpx.Proxy(found[1], ssl_context=self._trusted() if secure else None)
            # trust_env off: proxies are decided here, and a .netrc must not add a password
            return httpx.Client(
                headers=headers,
                verify=context,
                proxy=proxy,
                trust_env=False,
                follow_redirects=False,
                # an endpoint must not recognize the device by a cookie
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            )
        except ImportError as error:
            text = f"{found[0] if found else 'proxy'} names a SOCKS proxy, which needs the package socksio"
            raise CloudUnavailableError(f"{self.url}: {text}") from error
        except (ValueError, TypeError, httpx.InvalidURL) as error:
            name = found[0] if found else "proxy"
            text = f"{name}={shown_url(found[1]) if found else ''} cannot be used; give http://HOST:PORT"
            raise CloudUnavailableError(f"{self.url}: {text}, https:// or socks5://, or unset it") from error

    def _tls(self) -> ssl.SSLContext:
        if self._parsed.scheme == "http":
            # no certificate will be asked for; this context would refuse each one
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return self._trusted()

    def _trusted(self) -> ssl.SSLContext:
        environment = self._options.environment
        file, folder = environment.get("SSL_CERT_FILE") or None, environment.get("SSL_CERT_DIR") or None
        try:
            if file or folder:
                return ssl.create_default_context(cafile=file, capath=folder)
            return httpx.create_ssl_context(trust_env=False)
        except (OSError, ValueError) as error:
            given = [
                f"{name}={value}"
                for name, value in (("SSL_CERT_FILE", file), ("SSL_CERT_DIR", folder))
                if value
            ]
            text = f"{' '.join(given) or 'the certificates'} cannot be used: {one_line(error)}"
            raise CloudUnavailableError(f"{self.url}: {text}") from error

    def _proxy(self) -> tuple[str, str] | None:
        port = self._parsed.port or _DEFAULT_PORTS[self._parsed.scheme]
        return proxy_for(self._parsed.scheme, self._parsed.host, port, self._options.environment)

    def _proxy_secrets(self) -> tuple[str, ...]:
        found = self._proxy()
        user = found[1].partition("://")[2].rpartition("@")[0] if found else ""
        password = user.partition(":")[2]
        return (user, password, unquote(password))

    def _checked_key(self) -> str:
        key, variable = self._key, self._options.api_key_env
        if not key.isascii() or not key.isprintable() or " " in key:
            raise CloudUnavailableError(
                f"environment variable {variable}: not an API key (it holds spaces, control characters or "
                "letters beyond ASCII)"
            )
        if self._parsed.scheme == "http" and not is_loopback(self._parsed.host):
            raise CloudUnavailableError(
                f"{self.url}: the API key of {variable} would be sent unencrypted; use https, or name an "
                "environment variable that is not set"
            )
        return key


def base_url(url: str) -> str:
    """The endpoint's URL up to what the protocol adds: a full path or a doubled version is trimmed.

    Raises InputError; neither a password nor a query is ever shown.
    """
    shown = shown_url(url) if isinstance(url, str) else repr(url)
    try:
        # what stands around it comes from copying
        parsed = httpx.URL(url.strip())
    except (httpx.InvalidURL, TypeError, AttributeError, UnicodeError) as error:
        raise InputError(f"cloud URL {shown!r}: {_invalid(error)}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"cloud URL {shown!r}: expected http://HOST[:PORT]/v1 or https://HOST/v1")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise InputError(f"cloud URL {shown!r}: port {parsed.port} is not allowed; give 1 to 65535")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise InputError(
            f"cloud URL {shown!r}: user, password, query and fragment are not allowed in it; "
            "a key belongs into an environment variable"
        )
    text = str(parsed).rstrip("/")
    for path in _ENDPOINT_PATHS:
        if parsed.path.rstrip("/").endswith(path):
            text = text.removesuffix(path).rstrip("/")
    while text.endswith("/v1/v1"):
        text = text.removesuffix("/v1")
    return text


def _invalid(error: Any) -> str:
    # the library's message may quote the URL's parts
    return "not a URL" if not isinstance(error, httpx.InvalidURL) else one_line(str(error).split("'")[0])
