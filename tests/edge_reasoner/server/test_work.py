"""Clients of the service that go away: the engine is free again after the call under way."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import httpx
import pytest
from support.http_requests import post
from support.watched_model import TIMEOUT_S, WatchedModel, echo, local_of

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.local_model import LocalModel
from edge_reasoner.engine.loop import EngineLimits, TokenStream
from edge_reasoner.server.protocol import RequestError
from edge_reasoner.server.reference import serving
from edge_reasoner.server.work import Results, Streams


class _Told:
    """A model that says when a request has come in, and when its stream was cancelled or closed."""

    name = "watched"

    def __init__(self, local: LocalModel) -> None:
        self.local = local
        self.context_tokens = local.context_tokens
        self.asked, self.ended = threading.Semaphore(0), threading.Semaphore(0)

    def submit(self, request: ChatRequest) -> _ToldStream:
        stream = _ToldStream(self.local.submit(request), self.ended)
        self.asked.release()
        return stream

    def close(self) -> None:
        self.local.close()


class _ToldStream:
    def __init__(self, stream: TokenStream, ended: threading.Semaphore) -> None:
        self._stream, self._ended = stream, ended
        self.result = stream.result

    def __iter__(self):
        return iter(self._stream)

    def __next__(self):
        return next(self._stream)

    def cancel(self) -> None:
        self._stream.cancel()
        self._ended.release()

    def close(self) -> None:
        self._stream.close()


def _ask(base: str, token: str, *, stream: bool, max_tokens: int = 400) -> socket.socket:
    """Sends a raw completion request; the connection stays open."""
    body = json.dumps(
        {"model": "watched", "prompt": token, "stream": stream, "max_tokens": max_tokens}
    ).encode()
    port = int(base.rsplit(":", 1)[1].removesuffix("/v1"))
    connection = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
    connection.sendall(post("/v1/completions", body))
    return connection


def _token(model: _Told, text: str) -> int:
    (token,) = model.local.tokenizer.encode(text)
    return token


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("calls_before", [0, 1, 4])
def test_a_client_that_goes_away_costs_no_further_call(stream: bool, calls_before: int) -> None:
    """In the queue, in the prompt and within the answer, streamed or not."""
    watched: WatchedModel = echo()
    limits = EngineLimits(active=1) if calls_before == 0 else EngineLimits()
    told = _Told(local_of(watched, limits))
    first, second = _token(told, "Z"), _token(told, "Y")
    with serving(told) as base:
        with watched.held():
            params = SamplingParams(max_tokens=400)
            running = told.local.submit(ChatRequest(text="X", params=params)) if calls_before == 0 else None
            connection = _ask(base, "Z", stream=stream)
            assert told.asked.acquire(timeout=TIMEOUT_S)
            watched.arrive()
            watched.step(max(0, calls_before - 1))
            assert watched.calls_with(first) == calls_before
            connection.close()
            assert told.ended.acquire(timeout=TIMEOUT_S), "the service noticed"
        if running is not None:
            running.close()
        body = {"model": "watched", "prompt": "Y", "max_tokens": 3}
        reply = httpx.post(f"{base}/completions", json=body, timeout=TIMEOUT_S)
        assert reply.status_code == 200 and watched.calls_with(second) == 3
        assert watched.calls_with(first) == calls_before


def test_a_client_that_does_not_read_holds_nobody_up() -> None:
    """More answers than the engine computes at once, none of them read: the next client is answered."""
    told = _Told(local_of(echo(), EngineLimits(active=1)))
    with serving(told) as base:
        connections = [_ask(base, "Z", stream=True) for _ in range(3)]
        for _ in connections:
            assert told.asked.acquire(timeout=TIMEOUT_S)
        body = {"model": "watched", "prompt": "Y", "max_tokens": 3}
        reply = httpx.post(f"{base}/completions", json=body, timeout=TIMEOUT_S)
        assert reply.json()["usage"]["completion_tokens"] == 3
        for connection in connections:
            connection.close()


def test_closing_the_service_frees_the_engine() -> None:
    """A service that stops cancels what the engine has under way, and closes the model."""
    watched = echo(context_tokens=1_000_000)
    told = _Told(local_of(watched))
    with serving(told) as base:
        connection = _ask(base, "Z", stream=True, max_tokens=100_000)
        assert connection.recv(10)
    # the service's thread may still have a backlog of this fast model's pieces to drop
    end_s = time.monotonic() + TIMEOUT_S
    while not watched.closed and time.monotonic() < end_s:
        time.sleep(0.05)
    assert watched.closed
    connection.close()


async def _closed(held: list[Results]) -> None:
    await held[0].aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(held[0])


async def _dropped(held: list[Results]) -> None:
    held.clear()
    gc.collect()
    await asyncio.sleep(0)


@pytest.mark.parametrize("read", [0, 2])
@pytest.mark.parametrize("end", [_closed, _dropped])
def test_results_that_nobody_wants_cost_no_further_call(
    end: Callable[[list[Results]], Awaitable[None]], read: int
) -> None:
    """Closed or dropped, before their first item or after some."""

    async def run() -> None:
        watched = echo()
        streams = Streams(local := local_of(watched), max_waiting=3)
        ((first,), (second,)) = local.tokenizer.encode("Z"), local.tokenizer.encode("Y")
        with watched.held():
            held = [streams.submit(ChatRequest(text="Z", params=SamplingParams(max_tokens=400)))]
            await asyncio.to_thread(watched.arrive)
            await asyncio.to_thread(watched.step, read)
            assert [str(await anext(held[0])) for _ in range(read)] == ["Z"] * read
            await end(held)
        other = streams.submit(ChatRequest(text="Y", params=SamplingParams(max_tokens=4)))
        assert len([item async for item in other]) == 5
        assert (watched.calls_with(first), watched.calls_with(second)) == (read + 1, 4)
        streams.close()

    asyncio.run(run())


def test_closed_streams_refuse() -> None:
    """After the end a request gets a 503, and the model is closed."""

    async def run() -> None:
        watched = echo()
        streams = Streams(local_of(watched), max_waiting=3)
        streams.close()
        with pytest.raises(RequestError) as refused:
            streams.submit(ChatRequest(text="Z"))
        assert refused.value.status == 503 and watched.closed

    asyncio.run(run())
