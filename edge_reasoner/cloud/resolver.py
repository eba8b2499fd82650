"""Addresses of hosts. A lookup cannot be cancelled: each runs in a thread of its own, and few at a time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpcore

from edge_reasoner.cloud.line import Line

#: lookups of one client that may hang at a time
MAX_LOOKUPS = 4
#: a lookup older than this may hang; another request then starts its own
_FRESH_S = 5.0

#: (family, kind, protocol, address), as `socket.socket` and `connect` take them
Address = tuple[int, int, int, Any]
Resolve = Callable[..., Sequence[tuple[int, int, int, str, Any]]]


class _Lookup:
    """One lookup under way, for all who wait for it."""

    def __init__(self, begun_s: float) -> None:
        self.begun_s = begun_s
        self.ended = threading.Condition()
        self.found: list[Address] | None = None
        self.error: Exception | None = None

    def run(self, resolve: Resolve, host: str, port: int) -> None:
        """Asks, and tells those who wait."""
        found, failed = list[Address](), None
        try:
            found = [(f, k, p, address) for f, k, p, _, address in resolve(host, port, 0, socket.SOCK_STREAM)]
        except Exception as error:  # noqa: BLE001  # a thread's edge: who waits raises it
            failed = error
        with self.ended:
            self.found, self.error = found, failed
            self.ended.notify_all()

    def wake(self) -> None:
        """Lets those who wait look again."""
        with self.ended:
            self.ended.notify_all()


class Resolver:
    """Looks up the hosts of one client. Thread-safe."""

    def __init__(self, resolve: Resolve, longest_s: float) -> None:
        """`resolve`: as `socket.getaddrinfo`; may block. `longest_s`: for which a request waits for it."""
        self._resolve = resolve
        self._longest_s = longest_s
        self._lock = threading.Lock()
        self._lookups: dict[tuple[str, int], _Lookup] = {}
        self._running = 0

    def addresses(self, host: str, port: int, line: Line) -> list[Address]:
        """The addresses of a host, for a request on `line`.

        Raises httpcore.ConnectError (not found), httpcore.ConnectTimeout; UnicodeError and OverflowError for
        what is no host or port. A lookup that hangs stays behind: at most `MAX_LOOKUPS` of them, until the
        system's resolver gives up.
        """
        try:
            # an address needs no lookup
            numeric = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
            return [(f, k, p, address) for f, k, p, _, address in numeric]
        except socket.gaierror:
            lookup = self._joined(host, port, line.clock())
        wait_s = min(self._longest_s, line.left_s())
        with line.holding(lookup.wake), lookup.ended:
            lookup.ended.wait_for(lambda: lookup.found is not None or line.over, wait_s)
            found, error = lookup.found, lookup.error
        if isinstance(error, (UnicodeError, OverflowError)):
            raise error
        if error is not None:
            raise httpcore.ConnectError(str(error)) from error
        if found is None:
            raise httpcore.ConnectTimeout("the name was not found in time")
        return found

    def _joined(self, host: str, port: int, now_s: float) -> _Lookup:
        """The lookup under way, or a new one."""
        with self._lock:
            lookup = self._lookups.get((host, port))
            if lookup is not None and now_s - lookup.begun_s < _FRESH_S:
                return lookup
            if self._running >= MAX_LOOKUPS:
                if lookup is not None:
                    return lookup
                raise httpcore.ConnectError("too many lookups of names hang")
            lookup = _Lookup(now_s)
            thread = threading.Thread(
                target=self._run, args=(lookup, host, port), name="edge-reasoner-lookup", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                raise httpcore.ConnectError(f"no thread to look up a name: {error}") from error
            self._lookups[host, port] = lookup
            self._running += 1
            return lookup

    def _run(self, lookup: _Lookup, host: str, port: int) -> None:
        try:
            lookup.run(self._resolve, host, port)
        finally:
            with self._lock:
                self._running -= 1
                if self._lookups.get((host, port)) is lookup:
                    del self._lookups[host, port]
