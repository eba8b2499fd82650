"""The HTTP application: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/healthz`.

Who may ask, what a body may weigh and how long it may take is judged before (`guard.py`, `connection.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from edge_reasoner.chat.model import ChatRequest, ChatResult, thought_of
from edge_reasoner.errors import EdgeReasonerError, InputError, OverloadedError, one_line
from edge_reasoner.server.protocol import (
    ChatBody,
    CompletionBody,
    Reply,
    RequestError,
    finish_reason_body,
    parse_body,
    too_busy,
)
from edge_reasoner.server.work import Results, Streams

DEFAULT_MAX_WAITING = 8
_log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")


def create_app(streams: Streams, *, now: Callable[[], float] = time.time) -> Starlette:
    """The application over one model. `now` gives the seconds since 1970 that replies carry."""
    server = _Server(streams, now)
    return Starlette(
        routes=[
            Route("/healthz", server.health),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.one_model),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
        ],
        exception_handlers={
            RequestError: _refuse,
            HTTPException: _refuse_http,
            InputError: _refuse_input,
            OverloadedError: _refuse_busy,
            EdgeReasonerError: _fail,
            ClientDisconnect: _gone,
            Exception: _fail,
        },
    )


class _Server:
    def __init__(self, streams: Streams, now: Callable[[], float]) -> None:
        self.streams = streams
        self._now = now
        self._started_s = int(now())

    async def health(self, request: Request) -> Response:
        """Alive."""
        return JSONResponse({"status": "ok", "model": self.streams.model.name})

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model_body()]})

    async def one_model(self, request: Request) -> Response:
        """That model, by name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_body())

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = parse_body(await request.body(), ChatBody)
        self._check_model(body.model)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        asked = ChatRequest(
            tuple(body.chat()), params=body.params(max_tokens), context_tokens=body.attention_window
        )
        return await self._answer(request, body, asked, bool(body.logprobs))

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        body = parse_body(await request.body(), CompletionBody)
        self._check_model(body.model)
        asked = ChatRequest(
            text=body.prompt, params=body.params(body.max_tokens), context_tokens=body.attention_window
        )
        return await self._answer(request, body, asked, logprobs=False)

    async def _answer(
        self, request: Request, body: ChatBody | CompletionBody, asked: ChatRequest, logprobs: bool
    ) -> Response:
        chat = isinstance(body, ChatBody)
        prefix = "chatcmpl" if chat else "cmpl"
        reply = Reply(f"{prefix}-{uuid.uuid4().hex}", int(self._now()), self.streams.model.name, chat)
        results = self.streams.submit(asked)
        if not body.stream:
            return await _whole(request, results, reply, logprobs)
        # The first item decides the status: a prompt that does not fit must be 400, not a broken stream.
        first = await _first(request, results)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            _events(first, results, reply, logprobs=logprobs, usage=usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    def _check_model(self, name: str) -> None:
        if name != self.streams.model.name:
            raise RequestError(404, f"model {name[:100]!r} is not served; {self.streams.model.name!r} is")

    def _model_body(self) -> dict[str, Any]:
        model = self.streams.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "edge-reasoner",
            "context_tokens": model.context_tokens,
        }


async def _first(request: Request, results: Results) -> str | ChatResult:
    return await _unless_gone(request, anext(results), results)


async def _whole(request: Request, results: Results, reply: Reply, logprobs: bool) -> Response:
    async def collect() -> tuple[list[str], ChatResult]:
        pieces: list[str] = []
        async for item in results:
            if not isinstance(item, str):
                return pieces, item
            pieces.append(item)
        raise RequestError(500, "the generation ended without a result", "server_error")

    pieces, done = await _unless_gone(request, collect(), results)
    return JSONResponse(reply.whole(done, pieces if logprobs else None))


async def _unless_gone(request: Request, work: Awaitable[Outcome], results: Results) -> Outcome:
    """Awaits `work`; if the client goes away first, cancels it and raises ClientDisconnect."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await results.aclose()


async def _events(
    first: str | ChatResult, results: Results, reply: Reply, *, logprobs: bool, usage: bool
) -> AsyncIterator[bytes]:
    # aclosing: a client that goes away cancels the generation
    async with aclosing(results):
        if reply.chat:
            yield _event(reply.first_chunk())
        try:
            item = first
            while isinstance(item, str):
                tokens = [item] if logprobs else None
                yield _event(reply.chunk(str(item), tokens=tokens, thought=thought_of(item)))
                item = await anext(results)
            yield _event(reply.chunk(None, finish_reason_body(item.finish_reason)))
            if usage:
                yield _event(reply.usage_chunk(item.usage))
            yield b"data: [DONE]\n\n"
        except RequestError as error:
            yield _event(error.body())
        except Exception as error:  # noqa: BLE001  # the server's edge
            # the status line is long gone: the stream itself must say that it failed
            _log.error("generation failed: %s: %s", type(error).__name__, one_line(error))
            yield _event(RequestError(500, "the model failed", "server_error").body())


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JSONResponse(error.body(), error.status, headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = RequestError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
    return JSONResponse(known.body(), error.status_code, error.headers)


async def _refuse_input(request: Request, error: Exception) -> Response:
    return JSONResponse(RequestError(400, str(error)).body(), 400)


async def _refuse_busy(request: Request, error: Exception) -> Response:
    return await _refuse(request, too_busy(str(error)))


async def _fail(request: Request, error: Exception) -> Response:
    # What went wrong inside is for the log, not for the client.
    _log.error("request failed: %s: %s", type(error).__name__, one_line(error))
    return JSONResponse(RequestError(500, "the model failed", "server_error").body(), 500)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
