"""HTTP to one endpoint: the connection is made when it is first used, every fault becomes a CloudError."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypedDict
from urllib.parse import unquote

import httpcore
import httpx

from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.cloud.certificates import trusting, trusting_nobody
from edge_reasoner.cloud.encodings import unpacked
from edge_reasoner.cloud.endpoint import parse_endpoint
from edge_reasoner.cloud.line import Line
from edge_reasoner.cloud.logs import redacted_logs
from edge_reasoner.cloud.network import TimedBackend
from edge_reasoner.cloud.proxies import is_loopback, proxy_for
from edge_reasoner.cloud.redact import Redactor, is_telling, shown_url
from edge_reasoner.cloud.resolver import Resolve, Resolver
from edge_reasoner.cloud.retry import RetryError
from edge_reasoner.errors import CloudError, CloudUnavailableError, one_line
from edge_reasoner.privacy.screen import ScreenedBody

#: of the library: how a request may fail at the network
_NETWORK_ERRORS = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
)
#: bytes that may come before a reply's body: handshakes, interim replies, headers
_MAX_HEAD_BYTES = 1024 * 1024
#: of a body that is chunked, bytes on the wire for each that counts
_MAX_OVERHEAD = 4
_KEPT_CONNECTIONS = 20
_KEPT_S = 5.0
#: an answer that is whole waits no longer for the last bytes of its reply
_END_S = 0.05


class _Kept(TypedDict, total=False):
    """What all pools of connections are made with."""

    max_connections: int | None
    max_keepalive_connections: int
    keepalive_expiry: float
    network_backend: httpcore.NetworkBackend
    ssl_context: ssl.SSLContext


class Reply:
    """The head of a reply, and its body as it arrives. Valid inside `Transport.exchange`."""

    def __init__(
        self, response: httpcore.Response, line: Line, chunks: Callable[[int], Iterator[bytes]]
    ) -> None:
        self.status = response.status
        self.headers = httpx.Headers(response.headers)
        self._line = line
        #: the body, unpacked, within that many bytes
        self.chunks = chunks

    def body(self, limit_bytes: int) -> bytes:
        """The whole body. Raises CloudProtocolError beyond the limit."""
        return b"".join(self.chunks(limit_bytes))

    def let_end(self, chunks: Iterator[bytes]) -> None:
        """Takes the end of a body of which no more is wanted if it comes now: its connection is then kept."""
        with (
            self._line.until(self._line.clock() + _END_S),
            contextlib.suppress(CloudError, RetryError, *_NETWORK_ERRORS),
        ):
            next(chunks, None)

    def start_of_body(self, limit_bytes: int, within_s: float) -> bytes:
        """As much of the body as comes within the limits; for what is only shown."""
        body = b""
        with (
            self._line.until(self._line.clock() + within_s),
            contextlib.suppress(CloudError, RetryError, *_NETWORK_ERRORS),
        ):
            for chunk in self.chunks(limit_bytes):
                body += chunk
        return body


class Transport:
    """One endpoint's URL, key and connections. Thread-safe; connections are pooled."""

    def __init__(
        self,
        options: CloudOptions,
        clock: Callable[[], float] = time.monotonic,
        resolve: Resolve = socket.getaddrinfo,
    ) -> None:
        """Checks the URL's form and nothing else. Raises InputError."""
        self._endpoint = parse_endpoint(options.url)
        #: as it may be shown
        self.url = self._endpoint.shown
        self._options = options
        self._limits = options.limits
        self._clock = clock
        self._resolve = resolve
        self._begin()
        self._closed = False
        key = options.environment.get(options.api_key_env, "") if options.api_key_env else ""
        self._key = key.strip()
        secrets = self._endpoint.query_secrets
        #: for errors
        self.redactor = Redactor((self._key, *secrets, *self._proxy_secrets()))
        #: for answers, which may well hold "none" or "placeholder" where such a word stands in for a key
        self.answer_redactor = Redactor(filter(is_telling, (self._key, *secrets)))

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._lines = set[Line]()
        self._backend = TimedBackend(Resolver(self._resolve, self._limits.read_s))
        self._pool: httpcore.ConnectionPool | None = None
        self._headers = list[tuple[str, str]]()

    @contextmanager
    def exchange(self, method: str, path: str, body: ScreenedBody | None, line: Line) -> Iterator[Reply]:
        """One request, within the time of `line`. Faults of the network, in it and in the reading of its
        reply, become RetryError. `body`: what a screen has let pass."""
        pool = self._connected(line)
        line.allow(_MAX_HEAD_BYTES)
        try:
            with (
                redacted_logs(self.redactor),
                self._backend.serving(line),
                self._sent(pool, method, path, body, line) as response,
            ):
                line.allow(_MAX_HEAD_BYTES + _MAX_OVERHEAD * self._limits.response_bytes)
                yield Reply(response, line, lambda limit: self._chunks(response, limit))
        except httpcore.TimeoutException as error:
            connecting = isinstance(error, (httpcore.ConnectTimeout, httpcore.PoolTimeout))
            what = "connection" if connecting else "data"
            raise RetryError(CloudUnavailableError(f"{self.url}: timed out waiting for {what}")) from error
        except httpcore.ProxyError as error:
            text = f"{self.url}: the proxy refused: {one_line(error)}"
            raise RetryError(CloudUnavailableError(text)) from error
        except _NETWORK_ERRORS as error:
            # a connection closed in mid-answer arrives here too: worth another attempt
            kind = "broken reply: " if isinstance(error, httpcore.RemoteProtocolError) else ""
            said = one_line(error)
            raise RetryError(CloudUnavailableError(f"{self.url}: {kind}{said}")) from error
        except (UnicodeError, OverflowError) as error:
            # a host name that no resolver takes
            raise CloudUnavailableError(f"{self.url}: not a host and port: {one_line(error)}") from error
        finally:
            with self._lock:
                self._lines.discard(line)

    def close(self) -> None:
        """Closes connections; requests under way end at once. Idempotent."""
        self._leave_parents_connections()
        with self._lock:
            self._closed = True
            for line in self._lines:
                line.cut()
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _sent(
        self, pool: httpcore.ConnectionPool, method: str, path: str, body: ScreenedBody | None, line: Line
    ) -> contextlib.AbstractContextManager[httpcore.Response]:
        limits, left_s = self._limits, line.left_s()
        if left_s <= 0:
            raise CloudUnavailableError(f"{self.url}: no answer within {limits.total_s:g} s")
        target = self._endpoint.target(path)
        headers = [("Host", target.netloc.decode("ascii")), *self._headers]
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        if target.scheme == "http" and target.host.endswith(".localhost"):
            # not every resolver knows that these names are this machine
            target = target.copy_with(host="127.0.0.1")
        times = {name: min(limits.read_s, left_s) for name in ("read", "write", "pool")}
        return pool.stream(
            method,
            _core_url(target),
            headers=headers,
            content=body,
            extensions={"timeout": {**times, "connect": min(limits.connect_s, left_s)}},
        )

    def _chunks(self, response: httpcore.Response, limit_bytes: int) -> Iterator[bytes]:
        encoding = httpx.Headers(response.headers).get("content-encoding", "")
        try:
            yield from unpacked(response.iter_stream(), encoding, limit_bytes)
        except CloudUnavailableError as error:
            raise RetryError(CloudUnavailableError(f"{self.url}: {error}")) from error

    def _leave_parents_connections(self) -> None:
        """In a forked child: two processes on one connection would get each other's answers, and a lock that
        a thread of the parent held would be held for ever."""
        if self._pid != os.getpid():
            self._begin()

    def _connected(self, line: Line) -> httpcore.ConnectionPool:
        self._leave_parents_connections()
        # files of certificates may lie on a disk that hangs
        with line.locked(self._making):
            pool = self._pool or self._make_pool()
            with self._lock:
                if self._closed:
                    raise CloudUnavailableError(f"{self.url}: the client is closed")
                self._pool = pool
                self._lines.add(line)
                return pool

    def _make_pool(self) -> httpcore.ConnectionPool:
        """Raises CloudUnavailableError for a key, a proxy or certificates that cannot be used."""
        # identity: a stream that is packed arrives late; packed replies are taken all the same
        headers = [("Accept", "*/*"), ("Accept-Encoding", "identity"), ("User-Agent", "edge-reasoner")]
        self._check_secrecy()
        if self._key:
            headers.append(("Authorization", f"Bearer {self._checked_key()}"))
        self._headers = headers
        # proxies are decided here, and a .netrc must not add a password
        found = self._proxy()
        kept: _Kept = {
            "max_connections": None,
            "max_keepalive_connections": _KEPT_CONNECTIONS,
            "keepalive_expiry": _KEPT_S,
            "network_backend": self._backend,
        }
        try:
            kept["ssl_context"] = self._trusted() if self._endpoint.scheme == "https" else trusting_nobody()
            return httpcore.ConnectionPool(**kept) if found is None else self._proxy_pool(found[1], kept)
        except ImportError as error:
            text = f"{found[0] if found else 'proxy'} names a SOCKS proxy, which needs the package socksio"
            raise CloudUnavailableError(f"{self.url}: {text}") from error
        except (ValueError, TypeError, httpx.InvalidURL) as error:
            name = found[0] if found else "proxy"
            text = f"{name}={shown_url(found[1]) if found else ''} cannot be used; give http://HOST:PORT"
            raise CloudUnavailableError(f"{self.url}: {text}, https:// or socks5://, or unset it") from error

    def _proxy_pool(self, url: str, kept: _Kept) -> httpcore.ConnectionPool:
        """Raises ImportError, ValueError, TypeError and httpx.InvalidURL."""
        proxy = httpx.Proxy(url)
        if proxy.url.scheme.startswith("socks"):
            if importlib.util.find_spec("socksio") is None:
                raise ImportError("socksio")
            return httpcore.SOCKSProxy(_core_url(proxy.url), proxy.raw_auth, **kept)
        return httpcore.HTTPProxy(
            _core_url(proxy.url),
            proxy.raw_auth,
            proxy_ssl_context=self._trusted() if proxy.url.scheme == "https" else None,
            **kept,
        )

    def _trusted(self) -> ssl.SSLContext:
        try:
            return trusting(self._options.environment)
        except CloudUnavailableError as error:
            raise CloudUnavailableError(f"{self.url}: {error}") from error

    def _proxy(self) -> tuple[str, str] | None:
        place = self._endpoint
        return proxy_for(place.scheme, place.host, place.port, self._options.environment)

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
        return key

    def _check_secrecy(self) -> None:
        """Raises CloudUnavailableError if a secret would be sent where others can read it."""
        if self._endpoint.scheme != "http" or is_loopback(self._endpoint.host):
            return
        if self._key:
            raise CloudUnavailableError(
                f"{self.url}: the API key of {self._options.api_key_env} would be sent unencrypted; use "
                "https, or name an environment variable that is not set"
            )
        if self._endpoint.query_secrets:
            raise CloudUnavailableError(
                f"{self.url}: the secret in the URL's query would be sent unencrypted; use https"
            )


def _core_url(url: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
