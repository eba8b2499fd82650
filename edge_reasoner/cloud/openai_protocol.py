"""Client of the OpenAI chat-completions protocol, for endpoints that may be down, slow, broken or hostile."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import httpx
import msgspec

from edge_reasoner.chat.model import ChatRequest, PulledStream, Usage
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud.base import CloudOptions, CloudResult, CloudStream
from edge_reasoner.cloud.pump import pumped
from edge_reasoner.cloud.sse import read_events
from edge_reasoner.contract.template.render import Message
from edge_reasoner.errors import CloudError, CloudProtocolError, CloudUnavailableError, InputError

_RETRY_STATUS = frozenset((408, 409, 429, 500, 502, 503, 504, 529))
_MAX_SHOWN_CHARS = 200
_MAX_MODEL_LIST_BYTES = 1024 * 1024

_Pieces = Generator[str, None, CloudResult]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice]
    model: str | None = None
    usage: _Usage | None = None


class _Fault(msgspec.Struct):
    message: str = ""


class _FaultBody(msgspec.Struct):
    error: _Fault


class _ListedModel(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ListedModel]


class _Retry(Exception):  # noqa: N818  # never leaves this module
    """An attempt failed in a way that another may not; `wait_s` is the server's wish, if it had one."""

    def __init__(self, error: CloudError, wait_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s


class OpenAIModel:
    """One endpoint and model. Thread-safe; connections are pooled."""

    def __init__(
        self,
        options: CloudOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Checks the URL; sends nothing. Raises InputError."""
        self._url = _check_url(options.url)
        self._limits = options.limits
        self._model = options.model
        self._model_lock = threading.Lock()
        self._clock, self._sleep, self._uniform = clock, sleep, uniform
        # identity: a compressed reply could unpack to any size
        headers = {"Accept-Encoding": "identity", "User-Agent": "edge-reasoner"}
        key = options.environment.get(options.api_key_env, "") if options.api_key_env else ""
        if key:
            headers["Authorization"] = f"Bearer {_check_key(key, options.api_key_env or '', self._url)}"
        self._client = httpx.Client(headers=headers, follow_redirects=False)

    @property
    def name(self) -> str:
        """The model that is asked for; empty while the endpoint has not said which it serves."""
        return self._model or ""

    @property
    def context_tokens(self) -> int | None:
        """Not known here."""
        return None

    def submit(self, request: ChatRequest) -> CloudStream:
        """Starts an answer: see `ChatModel.submit`. Sends nothing before the first piece is asked for.

        Retries within the limits while nothing was yielded. Raises InputError at once: a raw text, or
        messages that are no JSON; CloudUnavailableError or CloudProtocolError from the stream, also in
        mid-answer.
        """
        if request.text is not None:
            raise InputError("a cloud endpoint takes messages; it cannot continue a raw text")
        _request_body("", request.messages, request.params, request.extra)
        stream: CloudStream = PulledStream(self._pieces(request, lambda: stream.cancelled))
        return stream

    def _pieces(self, request: ChatRequest, cancelled: Callable[[], bool]) -> _Pieces:
        deadline_s = self._clock() + self._limits.total_s
        late = CloudUnavailableError(f"{self._url}: not done within {self._limits.total_s:g} s")
        source = pumped(
            self._tried(request, deadline_s), deadline_s=deadline_s, clock=self._clock, late=lambda: late
        )
        texts: list[str] = []
        try:
            while True:
                try:
                    text = next(source)
                except StopIteration as end:
                    result: CloudResult = end.value
                    return replace(result, text="".join(texts))
                texts.append(text)
                yield text
                if cancelled():
                    return CloudResult("".join(texts), None, self.name, "cancelled", None)
        finally:
            source.close()

    def _tried(self, request: ChatRequest, deadline_s: float) -> _Pieces:
        body = _request_body(self._model_name(deadline_s), request.messages, request.params, request.extra)
        for attempt in range(self._limits.attempts):
            shown = False
            try:
                with self._post(body, deadline_s) as response:
                    texts = self._texts(response, deadline_s)
                    while True:
                        try:
                            text = next(texts)
                        except StopIteration as end:
                            result: CloudResult = end.value
                            return result
                        shown = True
                        yield text
            except _Retry as failed:
                if shown:
                    raise failed.error from failed
                self._back_off(attempt, failed, deadline_s)
        raise CloudUnavailableError(f"{self._url}: no attempt was allowed")

    def close(self) -> None:
        """Closes connections."""
        self._client.close()

    def _model_name(self, deadline_s: float) -> str:
        with self._model_lock:
            if self._model is None:
                self._model = self._first_model(deadline_s)
            return self._model

    def _first_model(self, deadline_s: float) -> str:
        for attempt in range(self._limits.attempts):
            try:
                with self._exchange("GET", "/models", None, deadline_s) as response:
                    body = self._body(response, deadline_s, _MAX_MODEL_LIST_BYTES)
                listed = msgspec.json.decode(body, type=_ModelList).data
                if not listed:
                    raise CloudProtocolError(f"{self._url}: lists no model; name one with --cloud-model")
                return listed[0].id
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise CloudProtocolError(f"{self._url}/models: not a model list: {error}") from error
            except _Retry as failed:
                self._back_off(attempt, failed, deadline_s)
        raise CloudUnavailableError(f"{self._url}: no attempt was allowed")

    @contextmanager
    def _post(self, body: bytes, deadline_s: float) -> Iterator[httpx.Response]:
        with self._exchange("POST", "/chat/completions", body, deadline_s) as response:
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "text/event-stream":
                raise CloudProtocolError(
                    f"{self._url}: content type {kind[:80]!r}; expected text/event-stream"
                )
            yield response

    @contextmanager
    def _exchange(
        self, method: str, path: str, body: bytes | None, deadline_s: float
    ) -> Iterator[httpx.Response]:
        """One request. Network faults in it, and in the reading of its response, become `_Retry`."""
        limits, left_s = self._limits, deadline_s - self._clock()
        if left_s <= 0:
            raise CloudUnavailableError(f"{self._url}: no answer within {limits.total_s:g} s")
        timeout = httpx.Timeout(min(limits.read_s, left_s), connect=min(limits.connect_s, left_s))
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            with self._client.stream(
                method, self._url + path, content=body, headers=headers, timeout=timeout
            ) as response:
                self._check_status(response, deadline_s)
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    raise CloudProtocolError(f"{self._url}: sent a compressed reply that was not asked for")
                yield response
        except httpx.TimeoutException as error:
            what = "connection" if isinstance(error, (httpx.ConnectTimeout, httpx.PoolTimeout)) else "data"
            raise _Retry(CloudUnavailableError(f"{self._url}: timed out waiting for {what}")) from error
        except (httpx.DecodingError, httpx.RemoteProtocolError) as error:
            # a connection closed in mid-answer arrives here too: worth another attempt
            raise _Retry(CloudUnavailableError(f"{self._url}: broken reply: {_one_line(error)}")) from error
        except httpx.HTTPError as error:
            raise _Retry(CloudUnavailableError(f"{self._url}: {_one_line(error)}")) from error

    def _check_status(self, response: httpx.Response, deadline_s: float) -> None:
        status = response.status_code
        if status == 200:
            return
        said = _fault_text(self._body(response, deadline_s, 64 * 1024, strict=False))
        text = f"{self._url}: HTTP {status}{said}"
        if status in _RETRY_STATUS:
            raise _Retry(CloudUnavailableError(text), _retry_after_s(response.headers.get("retry-after")))
        if 300 <= status < 400:
            raise CloudProtocolError(f"{text}: redirects are not followed")
        raise CloudProtocolError(text)

    def _body(
        self, response: httpx.Response, deadline_s: float, limit_bytes: int, *, strict: bool = True
    ) -> bytes:
        body = b""
        for chunk in self._chunks(response, deadline_s):
            body += chunk
            if len(body) > limit_bytes:
                if strict:
                    raise CloudProtocolError(f"{self._url}: a reply of more than {limit_bytes} bytes")
                return body[:limit_bytes]
        return body

    def _chunks(self, response: httpx.Response, deadline_s: float) -> Iterator[bytes]:
        for chunk in response.iter_raw():
            if self._clock() > deadline_s:
                raise CloudUnavailableError(f"{self._url}: not done within {self._limits.total_s:g} s")
            yield chunk

    def _texts(self, response: httpx.Response, deadline_s: float) -> _Pieces:
        usage: Usage | None = None
        finish: str | None = None
        model = self._model or ""
        events = read_events(
            self._chunks(response, deadline_s),
            line_bytes=self._limits.line_bytes,
            response_bytes=self._limits.response_bytes,
        )
        for data in events:
            if data == "[DONE]":
                return CloudResult("", None, model, finish or "stop", usage)
            chunk = self._parse(data)
            model = chunk.model or model
            if chunk.usage is not None:
                usage = Usage(max(0, chunk.usage.prompt_tokens), max(0, chunk.usage.completion_tokens))
            for choice in chunk.choices[:1]:
                finish = choice.finish_reason or finish
                if choice.delta.content:
                    yield choice.delta.content
        if finish is None:
            raise _Retry(CloudUnavailableError(f"{self._url}: the stream ended before the answer did"))
        return CloudResult("", None, model, finish, usage)

    def _parse(self, data: str) -> _Chunk:
        try:
            return msgspec.json.decode(data.encode("utf-8"), type=_Chunk)
        except (msgspec.DecodeError, RecursionError) as error:
            if said := _fault_text(data.encode("utf-8")):
                raise CloudProtocolError(f"{self._url}: failed while answering{said}") from error
            raise CloudProtocolError(f"{self._url}: not a chat-completions event: {error}") from error

    def _back_off(self, attempt: int, failed: _Retry, deadline_s: float) -> None:
        """Waits before the next attempt, or raises what failed if there is none."""
        limits = self._limits
        if attempt + 1 >= limits.attempts:
            raise failed.error from failed
        # full jitter: many devices that lost the same cloud must not come back together
        wait_s = self._uniform(0.0, min(limits.backoff_cap_s, limits.backoff_base_s * 2**attempt))
        if failed.wait_s is not None:
            if failed.wait_s > limits.retry_after_cap_s:
                asked = f"{failed.error}; it asked to wait {failed.wait_s:g} s, more than "
                raise CloudUnavailableError(f"{asked}{limits.retry_after_cap_s:g} s") from failed
            wait_s += failed.wait_s
        if self._clock() + wait_s >= deadline_s:
            raise failed.error from failed
        self._sleep(wait_s)


def _request_body(
    model: str, messages: Sequence[Message], params: SamplingParams, extra: Mapping[str, Any] | None
) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "messages": [dict(message) for message in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    if params.max_tokens is not None:
        body["max_tokens"] = params.max_tokens
    if params.stop:
        body["stop"] = list(params.stop)
    if params.seed is not None:
        body["seed"] = params.seed
    try:
        return msgspec.json.encode(body | dict(extra or {}))
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError(f"messages: cannot be written as JSON: {error}") from error


def _check_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise InputError(f"cloud URL {url!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"cloud URL {url!r}: expected http://HOST[:PORT]/v1 or https://HOST/v1")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise InputError("cloud URL: user, password, query and fragment are not allowed in it")
    return str(parsed).rstrip("/")


def _check_key(key: str, variable: str, url: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"environment variable {variable}: not an API key (spaces or control characters)")
    parsed = httpx.URL(url)
    if parsed.scheme == "http" and not _is_loopback(parsed.host):
        raise InputError(
            f"cloud URL {url}: the API key of {variable} would be sent unencrypted; use https, "
            "or name an environment variable that is not set"
        )
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _retry_after_s(header: str | None) -> float | None:
    # Seconds only; the date form needs a clock that the device and the server agree on.
    if header is None or not header.strip().isascii() or not header.strip().isdigit():
        return None
    return float(header.strip()[:9])


def _fault_text(body: bytes) -> str:
    try:
        message = msgspec.json.decode(body, type=_FaultBody).error.message
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return (
        f": {' '.join(message.split())[:_MAX_SHOWN_CHARS]}" if message else ": the endpoint reports an error"
    )


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:_MAX_SHOWN_CHARS]
