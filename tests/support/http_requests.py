"""Requests as bytes, for tests that speak to a socket."""

from __future__ import annotations

import socket


def post(path: str, body: bytes, *, more: str = "") -> bytes:
    """A well-formed request with a JSON body; `more`: further lines of its head, each with its line end."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{more}\r\n"
    ).encode("latin-1") + body


def port_of(base: str) -> int:
    """The port of a base URL (…/v1)."""
    return int(base.rsplit(":", 1)[1].removesuffix("/v1"))


def exchange(base: str, data: bytes, *, timeout_s: float = 60.0) -> bytes:
    """Sends bytes, and reads what comes back until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port_of(base)), timeout=timeout_s) as connection:
        connection.sendall(data)
        heard = b""
        while piece := connection.recv(65536):
            heard += piece
    return heard
