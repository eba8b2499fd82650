"""What one client, and all of them together, may take of the service; and who gives way when it is full."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal, Protocol

from edge_reasoner.server.protocol import MAX_REQUEST_BYTES

#: what a connection is about: nothing yet (or no more), a request's head, its body, the answer, its end
Phase = Literal["idle", "head", "body", "answer", "closing"]


@dataclass(frozen=True)
class HttpLimits:
    """Bounds of connections and requests.

    A request's head has to be whole `head_s` after its first byte (or after the connection was made), its
    body `body_s` after the head. `idle_s`: between requests. `write_s`: a client that reads nothing of what
    is ready for it. `end_s`: what open streams get at the end of the service. `bodies_bytes`: of all
    unfinished bodies together. `client_connections`: of one address; loopback, which all local clients share,
    is bounded by `connections` alone.
    """

    connections: int = 128
    client_connections: int = 64
    head_bytes: int = 16 * 1024
    headers: int = 64
    body_bytes: int = MAX_REQUEST_BYTES
    bodies_bytes: int = 32 * 1024 * 1024
    head_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 5.0
    write_s: float = 30.0
    end_s: float = 2.0


class Held(Protocol):
    """A connection, as far as its place is concerned."""

    @property
    def client(self) -> str:
        """The address it comes from."""

    @property
    def phase(self) -> Phase: ...

    @property
    def waits_for_client(self) -> bool:
        """Whether it is the client's turn: such a connection may be given up for another one."""

    @property
    def body_bytes(self) -> int:
        """Bytes of an unfinished body that are held."""

    def evict(self) -> None:
        """Ends the connection at once."""

    def end(self) -> None:
        """The service ends: so does the connection, unless an answer is under way."""


class Connections:
    """The connections there are, in the order in which their clients were last heard of a new step.

    A full service gives up the connection that has waited longest for a client, of the address that has most
    of them: slow clients, however many, shut nobody out.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._all: dict[Held, None] = {}
        self._bodies_bytes = 0

    def __len__(self) -> int:
        return len(self._all)

    def all(self) -> tuple[Held, ...]:
        """Those there are, the longest waiting first."""
        return tuple(self._all)

    def admit(self, connection: Held) -> bool:
        """Takes a new connection in, if need be for an older one; False: there is no place for it."""
        mine = [held for held in self._all if held.client == connection.client]
        if len(mine) >= self._limits.client_connections and not _is_loopback(connection.client):
            if not _give_up_one(mine):
                return False
        elif len(self._all) >= self._limits.connections and not _give_up_one(self._by_crowd()):
            return False
        self._all[connection] = None
        return True

    def step(self, connection: Held) -> None:
        """The connection has come to another phase: it is the youngest again."""
        if connection in self._all:
            del self._all[connection]
            self._all[connection] = None

    def grow(self, connection: Held, count: int) -> None:
        """A body grew by `count` bytes; too many of all bodies cost the oldest unfinished one."""
        self._bodies_bytes += count
        while self._bodies_bytes > self._limits.bodies_bytes:
            others = [held for held in self._all if held.body_bytes and held is not connection]
            if not _give_up_one(others):
                return

    def shrink(self, count: int) -> None:
        """So many bytes of bodies are held no more."""
        self._bodies_bytes -= count

    def discard(self, connection: Held) -> None:
        """The connection is gone."""
        self._all.pop(connection, None)

    def _by_crowd(self) -> list[Held]:
        """All, those of the addresses with most connections first."""
        counts: dict[str, int] = {}
        for held in self._all:
            counts[held.client] = counts.get(held.client, 0) + 1
        return sorted(self._all, key=lambda held: -counts[held.client])


def _give_up_one(connections: list[Held]) -> bool:
    victim = next((held for held in connections if held.waits_for_client), None)
    if victim is None:
        return False
    victim.evict()
    return True


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False
