"""The sockets below the HTTP library: whatever it waits for ends with the request that it waits for.

The library bounds each read by itself, so that a server which sends a byte now and then holds it for ever.
Here each step of a request (name, connection, proxy, TLS, every read and write) gets what is left of the
request's time, and `Line.cut` ends the step under way from any thread.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import httpcore

from edge_reasoner.cloud.line import Line
from edge_reasoner.cloud.resolver import Resolver

_READ_BYTES = 64 * 1024
_GIVEN_UP = "the request was given up"
_T = TypeVar("_T")


class TimedBackend(httpcore.NetworkBackend):
    """Makes connections that keep to the line of the thread which uses them. Thread-safe."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        # the library hands no more than a number of seconds down to a socket
        self._served = threading.local()

    @contextlib.contextmanager
    def serving(self, line: Line) -> Iterator[None]:
        """What this thread does at the network meanwhile is done for `line`."""
        self._served.line = line
        try:
            yield
        finally:
            del self._served.line

    def line(self) -> Line:
        """The line that this thread serves."""
        line: Line = self._served.line
        return line

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """See `NetworkBackend`: each address of the host is tried for `timeout` seconds. Names that cannot be
        looked up are a UnicodeError or an OverflowError."""
        line = self.line()
        error: httpcore.NetworkError | httpcore.TimeoutException = httpcore.ConnectError("has no address")
        for family, kind, protocol, address in self._resolver.addresses(host, port, line):
            try:
                return TimedStream(_connected(family, kind, protocol, address, line, timeout), self.line)
            except TimeoutError:
                error = httpcore.ConnectTimeout("timed out")
            except OSError as failed:
                error = httpcore.ConnectError(str(failed))
            if line.over:
                break
        raise error


def _connected(
    family: int, kind: int, protocol: int, address: Any, line: Line, timeout_s: float | None
) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        made.settimeout(_within(line, timeout_s, TimeoutError))
        with line.holding(lambda: _shut(made)):
            made.connect(address)
        if line.over:
            raise OSError(_GIVEN_UP)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        made.close()
        raise
    return made


class TimedStream(httpcore.NetworkStream):
    """A TCP connection. `line` gives the line that a step is done for."""

    def __init__(self, connection: socket.socket, line: Callable[[], Line]) -> None:
        self._socket = connection
        self._line = line
        self._failed = False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._step(timeout, httpcore.ReadTimeout, httpcore.ReadError) as line:
            received = self._socket.recv(max_bytes)
        line.spend(len(received))
        return received

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        rest = memoryview(buffer)
        while rest:
            with self._step(timeout, httpcore.WriteTimeout, httpcore.WriteError):
                rest = rest[self._socket.send(rest) :]

    def close(self) -> None:
        if self._failed:
            # what is still to be sent must not keep the system busy with a server that does not take it
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            # another thread that waits here wakes up
            _shut(self._socket)
        self._socket.close()

    @contextlib.contextmanager
    def _step(
        self, timeout_s: float | None, late: type[Exception], failed: type[Exception]
    ) -> Iterator[Line]:
        """Whatever waits for the socket, within the time of its line."""
        line = self._line()
        try:
            self._socket.settimeout(_within(line, timeout_s, late))
            with line.holding(lambda: _shut(self._socket)):
                yield line
        except TimeoutError as error:
            self._failed = True
            raise late("timed out") from error
        except OSError as error:
            self._failed = True
            raise failed(str(error)) from error
        finally:
            self._failed |= line.over

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _secured(self, self._line, ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return self._has_something()
        return self._socket if info == "socket" else None

    def _has_something(self) -> bool:
        """Whether a read would not wait: for data, an end or an error."""
        try:
            self._socket.settimeout(0)
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True


class TlsStream(httpcore.NetworkStream):
    """TLS over any stream, also over another one of its kind (an https proxy)."""

    def __init__(
        self,
        inner: httpcore.NetworkStream,
        line: Callable[[], Line],
        context: ssl.SSLContext,
        name: str | None,
    ) -> None:
        """Raises ValueError for a name that cannot be one."""
        self._inner = inner
        self._line = line
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)

    def shake_hands(self, timeout_s: float | None) -> None:
        """Raises ssl.SSLError, and errors of the stream below."""
        try:
            self._step(self._tls.do_handshake, timeout_s)
        except ssl.SSLError:
            # tells the server why
            with contextlib.suppress(httpcore.NetworkError, httpcore.TimeoutException):
                self._inner.write(self._outgoing.read(), timeout_s)
            raise

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return self._step(partial(self._tls.read, max_bytes), timeout)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return b""
        except ssl.SSLError as error:
            raise httpcore.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            for start in range(0, len(buffer), _READ_BYTES):
                # memory takes all of it
                self._step(partial(self._tls.write, buffer[start : start + _READ_BYTES]), timeout)
        except ssl.SSLError as error:
            raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _secured(self, self._line, ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._tls
        if info == "is_readable" and self._tls.pending():
            return True
        return self._inner.get_extra_info(info)

    def _step(self, step: Callable[[], _T], timeout_s: float | None) -> _T:
        """What `step` gives, once the other side has sent what it needs, within `timeout_s` in all."""
        line = self._line()
        end_s = None if timeout_s is None else line.clock() + timeout_s
        while True:
            wants_more, result = False, None
            try:
                result = step()
            except ssl.SSLWantReadError:
                wants_more = True
            left_s = None if end_s is None else end_s - line.clock()
            if self._outgoing.pending:
                self._inner.write(self._outgoing.read(), left_s)
            if not wants_more:
                return result  # type: ignore[return-value]  # step may give None
            received = self._inner.read(_READ_BYTES, left_s)
            if received:
                self._incoming.write(received)
            else:
                self._incoming.write_eof()


def _secured(
    inner: httpcore.NetworkStream,
    line: Callable[[], Line],
    context: ssl.SSLContext,
    name: str | None,
    timeout_s: float | None,
) -> TlsStream:
    """TLS over `inner`, which is closed if that fails."""
    try:
        made = TlsStream(inner, line, context, name)
        made.shake_hands(timeout_s)
    except BaseException as error:
        inner.close()
        if isinstance(error, httpcore.TimeoutException):
            raise httpcore.ConnectTimeout(str(error)) from error
        if isinstance(error, (OSError, ValueError, httpcore.NetworkError)):
            raise httpcore.ConnectError(str(error)) from error
        raise
    return made


def _within(line: Line, timeout_s: float | None, late: type[Exception]) -> float:
    """Seconds that a step may take. Raises `late` if there are none left."""
    left_s = line.left_s() if timeout_s is None else min(timeout_s, line.left_s())
    if left_s <= 0:
        raise late("timed out")
    return left_s


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
